"""Statistics by which the units of a Llama are ranked: their names, and the file that holds them."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import Tensor

from llamita import checkpoints, storage

FILE = "scores.safetensors"
FORMAT = 2


class WidthScore(StrEnum):
    """How MLP units, and channels of attention heads, are ranked within a layer."""

    activation = "activation"
    """Mean over a row's tokens of the absolute value, L2 over rows (Muralidharan et al., 2024, arXiv:2407.14679)."""
    norm_product = "norm_product"
    """L2 norm over tokens times the norm of the unit's output column (Sun et al., 2023, arXiv:2306.11695)."""
    magnitude = "magnitude"
    """Product of the norms of the unit's weights; needs no calibration text."""
    fluctuation = "fluctuation"
    """Variance over tokens times the squared norm of the output column (An et al., 2023, arXiv:2312.11983, WIFV)."""
    taylor_unit = "taylor_unit"
    """Change of the loss to first order without the unit, squared for each token: see
    :func:`llamita.prune.gradients.measure` (Molchanov et al., 2019, arXiv:1906.10771)."""
    taylor_element = "taylor_element"
    """Change of the loss to first order without each of the unit's weights, absolute values added (Ma et al., 2023,
    arXiv:2305.11627)."""
    obs = "obs"
    """When the unit leaves if at every step that one does whose absence the others, fitted anew, can best make up for
    (Hassibi and Stork, 1993; see :mod:`llamita.prune.obs`). Heads and KV heads leave as blocks."""
    leverage = "leverage"
    """Ridge leverage of the unit among the others (Lin et al., 2024, arXiv:2408.09632)."""

    @property
    def second_order(self) -> bool:
        """Whether it needs the covariance of all units of a layer."""
        return self in (WidthScore.obs, WidthScore.leverage)

    @property
    def by_gradient(self) -> bool:
        """Whether it needs the gradient of the loss."""
        return self in (WidthScore.taylor_unit, WidthScore.taylor_element)


class HiddenScore(StrEnum):
    """How channels of the residual stream are ranked, for all layers at once."""

    activation = "activation"
    """As for widths, at the outputs of both norms of each layer, summed over norms (arXiv:2407.14679, section 2)."""
    magnitude = "magnitude"
    """Energy that the weights write into the channel times energy of the weights that read it."""
    pca = "pca"
    """Not channels but directions: one rotation of the whole stream to its principal components, the first of which
    stay (Ashkboos et al., 2024, arXiv:2401.15024, section 3.3, with one rotation for all layers)."""


class LayerScore(StrEnum):
    """How whole layers are ranked."""

    block_influence = "block_influence"
    """One minus the mean cosine of a layer's input and output (Men et al., 2024, arXiv:2403.03853, eq. 1)."""
    magnitude = "magnitude"
    """Frobenius norm of all the layer's weights."""
    angular = "angular"
    """The block of neighbours over which the stream turns least (Gromov et al., 2024, arXiv:2403.17887)."""
    greedy = "greedy"
    """One after another, each time the layer without which the loss is least: see
    :func:`llamita.prune.depth.greedy` (Kim et al., 2024, arXiv:2402.02834; Song et al., 2024, arXiv:2402.09025)."""
    contiguous = "contiguous"
    """The block of neighbours without which the loss is least: see :func:`llamita.prune.depth.contiguous`."""

    @property
    def block(self) -> bool:
        """Whether it ranks blocks of neighbours, in a table ``depth.<name>``, and not single layers."""
        return self in (LayerScore.angular, LayerScore.contiguous)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Statistics of one model on one calibration set. Tensors, in float64, larger = more important:

    - ``layers.block_influence``, ``layers.magnitude`` [L]
    - ``mlp.activation``, ``mlp.norm_product``, ``mlp.fluctuation``, ``mlp.magnitude`` [L, F]
    - the same of ``attention`` [L, H, head_dim]: inputs of o_proj
    - ``depth.angular`` [L, L]: angle over the block of n layers from layer l on, at [l, n - 1]
    - where asked for, ``mlp.taylor_unit``, ``mlp.taylor_element`` [L, F], the same of ``attention`` [L, H, head_dim];
      ``layers.greedy`` [L] and ``depth.greedy`` [rounds, L], ``depth.contiguous`` [L, longest block]: see
      :mod:`llamita.prune.depth`
    - where asked for, ``mlp.obs``, ``mlp.leverage`` [L, F], ``attention.leverage`` [L, H, head_dim], ``heads.obs``
      [L, H] and ``groups.obs`` [L, K], a KV head with its query heads
    - ``hidden.activation``, ``hidden.magnitude`` [L, 2, D]: outputs of the two norms of each layer
    - ``rotary.query`` [L, H, head_dim / 2], ``rotary.key`` [L, K, head_dim / 2]: mean energy of each rotary pair
    - ``norm.energy`` [2 L + 1, D], ``norm.epsilon`` [2 L + 1]: see :func:`norm_gain`; the final norm comes last
    - ``directions.vectors`` [D, D], ``directions.energy`` [D]: see :func:`principal_directions`
    - ``head.covariance`` [D, D], float32: mean outer product of the final norm's output before its gain

    Without calibration text only the magnitudes are there, and ``norm`` is their estimate.
    """

    tensors: dict[str, Tensor]
    info: dict[str, Any]
    """Where they come from: hashes of source and data, tokens, dtype, loss."""

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            ValueError: it was not measured.
        """
        if name not in self.tensors:
            raise ValueError(
                f"scores hold no {name}: it is measured on text, where it is asked for, so set calibration.path and no "
                "scores.path (or choose the magnitude)"
            )
        return self.tensors[name]

    @property
    def has_text(self) -> bool:
        """Whether they were measured on text: else only the magnitudes are there."""
        return bool(self.info["tokens"])

    def check_finite(self) -> None:
        """Hold that there is nothing among them by which units could not be ranked.

        Raises:
            ValueError: a score, or the loss, is not finite.
        """
        bad = [name for name, tensor in self.tensors.items() if not tensor.isfinite().all()]
        if not math.isfinite(self.info.get("loss") or 0.0):
            bad.append("the loss")
        if bad:
            raise ValueError(
                f"scores are not finite: {', '.join(bad)}; set calibration.dtype=float32, or check the weights"
            )

    def save(self, folder: Path) -> None:
        """Write ``scores.safetensors`` and ``scores.json`` into ``folder``, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_json(folder / "scores.json", self.info)
        checkpoints.write_tensors(folder / FILE, self.tensors, {"info": json.dumps(self.info, sort_keys=True)})

    @property
    def content_hash(self) -> str:
        """Hash of all tensors."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(name.encode() + self.tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def layer_means(self) -> list[dict[str, float]]:
        """For each layer the mean of each of its scores: ``mlp/importance/activation`` and so on."""
        axes = ("layers", "mlp", "attention", "hidden")
        names = [name for name in self.tensors if name.split(".")[0] in axes]
        rows = len(self.tensors["layers.magnitude"])
        label = {name: name.replace(".", "/importance/") for name in names}
        return [{label[name]: float(self.tensors[name][row].mean()) for name in names} for row in range(rows)]

    @classmethod
    def load(cls, folder: Path) -> Scores:
        """Read scores from ``folder``, or from the directory of a run that measured them.

        Raises:
            ValueError: there are none, or they are of another format.
        """
        file = next((f for f in (folder / FILE, folder / "pruning" / FILE) if f.is_file()), None)
        if file is None:
            raise ValueError(f"scores.path={folder} holds no {FILE}")
        tensors, metadata = checkpoints.read_tensors(file)
        info = json.loads(metadata.get("info", "{}"))
        if info.get("format") != FORMAT:
            raise ValueError(f"{file} has format {info.get('format')}, this program reads {FORMAT}")
        return cls(tensors=tensors, info=info)
