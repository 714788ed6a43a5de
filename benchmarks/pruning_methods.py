"""The methods that ``benchmarks/pruning.py`` compares: the peers' published criteria, and this project's.

A peer's criterion ranks the units of our plan, so that nothing but the choice differs: no compensation, and norm gains
as they were. Where two matrices become one, all get the same mixture, because no peer publishes one.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llamita import checkpoints
from llamita.prune import depth, importance, mend, plan, stream, surgery
from llamita.prune.compensation import CompensationConfig, Prefix
from llamita.prune.ranking import ScoreConfig
from llamita.prune.scores import FILE, HiddenScore, LayerScore, Scores, WidthScore
from llamita.prune.target import TargetConfig
from pruning_shapes import Family, Target
from pruning_table import CLOSED_FORMS, DEFAULT, WITHOUT

STEP_ROWS = 4


class Loaded:
    """A model that is whole in memory, read as a directory is."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.config = LlamaConfig.from_dict(model.config.to_dict())
        self.shape = checkpoints.shape_of(self.config)
        self.dtype = model.dtype
        self._tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name."""
        return self._tensors[name]

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of a layer."""
        return {name: self[f"model.layers.{index}.{name}"] for name in self.shape.layer_tensors()}

    def head(self) -> Tensor:
        """The output matrix."""
        return self["lm_head.weight"]


def loaded(model: stream.Model) -> Loaded:
    """A model of which every tensor is computed."""
    if isinstance(model, Loaded):
        return model
    llama = LlamaForCausalLM(LlamaConfig.from_dict(model.config.to_dict())).to(model.dtype)
    names = ("model.embed_tokens.weight", "model.norm.weight")
    tensors = {name: model[name] for name in names} | {"lm_head.weight": model.head()}
    for index in range(model.shape.num_hidden_layers):
        tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in model.layer(index).items()}
    llama.load_state_dict(tensors, strict=True)
    return Loaded(llama.eval())


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """What a method is given."""

    weights: checkpoints.Weights
    scores: Scores
    """Of the calibration rows; measured once for all methods."""
    calibration: list[stream.Batch]
    target: Target
    seed: int
    device: str


Cut = Callable[[Case], stream.Model]
MAGNITUDE: dict[str, Any] = {
    "mlp": WidthScore.magnitude,
    "attention": WidthScore.magnitude,
    "hidden": HiddenScore.magnitude,
    "layers": LayerScore.magnitude,
}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to make the smaller model."""

    name: str
    families: frozenset[Family]
    cut: Cut
    ours: bool = False
    seeded: bool = False
    """Whether the seed changes what it makes, so that it is repeated."""


def planned(
    case: Case,
    kinds: ScoreConfig,
    scores: Scores | None = None,
    *,
    keep_layers: list[int] | None = None,
) -> plan.Plan:
    """The plan of a criterion with norm gains as they were."""
    config = dataclasses.replace(case.target.config(), keep_layers=keep_layers)
    made = plan.make(scores or case.scores, case.weights.shape, config, kinds)
    return dataclasses.replace(made, norm_gain=torch.ones_like(made.norm_gain))


def ranked(**kinds: Any) -> Cut:
    """Units by scores of the calibration pass."""
    return lambda case: surgery.Pruned(case.weights, planned(case, ScoreConfig(**kinds)))


def without_least_loss(case: Case) -> list[int]:
    """The layers to keep when those go whose removal, of each alone, raises the loss on the calibration rows least.

    Kim et al., 2024, arXiv:2402.02834, section 3.1; Muralidharan et al., 2024, arXiv:2407.14679, section 2.
    """
    everything = range(case.weights.shape.num_hidden_layers)
    alone = [(layer, layer + 1) for layer in everything]
    how = depth.Removals(dtype=torch.float32, device=case.device)
    losses = depth.losses(case.weights, everything, alone, case.calibration, how)
    keep = case.target.shape.num_hidden_layers
    return sorted(sorted(everything, key=lambda layer: -losses[layer])[:keep])


def minitron(case: Case) -> stream.Model:
    """Muralidharan et al., 2024: activations for every width, the loss for layers."""
    kinds = ScoreConfig(mlp=WidthScore.activation, attention=WidthScore.activation, hidden=HiddenScore.activation)
    fewer = case.target.shape.num_hidden_layers < case.weights.shape.num_hidden_layers
    layers = without_least_loss(case) if fewer else None
    return surgery.Pruned(case.weights, planned(case, kinds, keep_layers=layers))


def random_units(case: Case) -> stream.Model:
    """Units drawn by lot."""
    generator = torch.Generator().manual_seed(case.seed)
    drawn = {
        name: torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith((".magnitude", ".activation"))
        else tensor
        for name, tensor in sorted(case.scores.tensors.items())
    }
    lots = Scores(tensors=drawn, info=case.scores.info)
    return surgery.Pruned(case.weights, planned(case, ScoreConfig(**MAGNITUDE), lots))


def random_start(case: Case) -> stream.Model:
    """A freshly initialised model of the same shape: what a cut must beat once both are trained."""
    config = LlamaConfig.from_dict(case.weights.config.to_dict() | case.target.shape.config_fields())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        return Loaded(LlamaForCausalLM(config).float())


def ours(config: CompensationConfig, **kinds: Any) -> Cut:
    """What ``recipes/prune.py`` does with these settings; its defaults where nothing is said."""

    def make(case: Case) -> stream.Model:
        made = plan.make(case.scores, case.weights.shape, case.target.config(), ScoreConfig(**kinds))
        pruned = surgery.Pruned(case.weights, made)
        if not config.wanted:
            return pruned
        return mended(pruned, case.calibration, config, case.device)

    return make


def mended(pruned: surgery.Pruned, text: list[stream.Batch], config: CompensationConfig, device: str) -> Loaded:
    """The cut model fitted to the whole one."""
    # A step takes one batch, and the closed forms do not care: small batches are many steps' worth of text.
    batches = [
        {name: tensor[first : first + STEP_ROWS] for name, tensor in batch.items()}
        for batch in text
        for first in range(0, len(batch["input_ids"]), STEP_ROWS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        return loaded(mend.mend(pruned, batches, config, Path(folder), dtype=torch.float32, device=device))


WIDTHS = frozenset({Family.mlp, Family.width})
DEPTH = frozenset({Family.depth})
ALL = frozenset(Family)


def peers() -> Iterator[Method]:
    """The published criteria, without compensation."""
    yield Method(name="random start", families=ALL, cut=random_start, seeded=True)
    yield Method(name="random units", families=ALL, cut=random_units, seeded=True)
    yield Method(name="magnitude", families=ALL, cut=ranked(**MAGNITUDE))
    yield Method(name="Minitron", families=ALL, cut=minitron)
    yield Method(name="Wanda-sp", families=WIDTHS, cut=_width(WidthScore.norm_product))
    # Scores that the importance pass may not know.
    for name, score in (("FLAP", "fluctuation"), ("LLM-Pruner", "taylor_element"), ("Taylor unit", "taylor_unit")):
        if score in WidthScore.__members__:
            yield Method(name=name, families=WIDTHS, cut=_width(WidthScore[score]))
    slice_gpt = ranked(mlp=WidthScore.norm_product, attention=WidthScore.norm_product, hidden=HiddenScore.pca)
    yield Method(name="SliceGPT, one rotation", families=sliced(), cut=slice_gpt)
    yield Method(name="ShortGPT", families=DEPTH, cut=ranked(layers=LayerScore.block_influence))
    if "angular" in LayerScore.__members__:
        yield Method(name="Gromov angular", families=DEPTH, cut=ranked(layers=LayerScore["angular"]))


def _width(score: WidthScore) -> Cut:
    return ranked(mlp=score, attention=score)


OFF = CompensationConfig(
    gains=False,
    readers=False,
    values=False,
    attention_steps=0,
    writers=False,
    layer_steps=0,
    head_steps=0,
    tied_steps=0,
)
CLOSED = dataclasses.replace(CompensationConfig(), attention_steps=0, layer_steps=0, head_steps=0, tied_steps=0)
REFIT = dataclasses.replace(OFF, writers=True, prefix=Prefix.whole)
NORM_PRODUCT: dict[str, Any] = {"mlp": WidthScore.norm_product, "attention": WidthScore.norm_product}


def compensated() -> Iterator[Method]:
    """Published compensations, and this project's."""
    osscar = ours(REFIT, hidden=HiddenScore.activation)
    yield Method(name="OSSCAR: elimination + least squares", families=WIDTHS, cut=osscar)
    replace = ours(dataclasses.replace(OFF, writers=True), layers=LayerScore.angular)
    yield Method(name="ReplaceMe: angular + least squares", families=DEPTH, cut=replace)
    yield Method(name="Llamita, cut only", families=ALL, cut=ours(OFF), ours=True)
    yield Method(name="Llamita, norm product + closed forms", families=ALL, cut=ours(CLOSED, **NORM_PRODUCT), ours=True)
    yield Method(name=CLOSED_FORMS, families=ALL, cut=ours(CLOSED), ours=True)
    whole = dataclasses.replace(CLOSED, prefix=Prefix.whole)
    yield Method(name="Llamita, closed forms, whole prefix", families=ALL, cut=ours(whole), ours=True)
    channels = ours(CLOSED, hidden=HiddenScore.activation)
    yield Method(name="Llamita, channels + closed forms", families=sliced(), cut=channels, ours=True)
    yield Method(name=DEFAULT, families=ALL, cut=ours(CompensationConfig()), ours=True)
    parts: dict[str, Any] = {
        "gains": False,
        "readers": False,
        "values": False,
        "attention_steps": 0,
        "writers": False,
        "layer_steps": 0,
        "head_steps": 0,
        "tied_steps": 0,
    }
    for part, off in parts.items():
        lacking = ours(dataclasses.replace(CompensationConfig(), **{part: off}))
        yield Method(name=f"{WITHOUT}{part}", families=frozenset({Family.llama}), cut=lacking, ours=True)


def sliced() -> frozenset[Family]:
    """Where the hidden size is cut."""
    return frozenset({Family.axes, Family.llama})


def methods() -> list[Method]:
    """All of them, the peers' first."""
    return [*peers(), *compensated()]


def measure(
    weights: checkpoints.Weights, text: list[stream.Batch], pad_id: int, device: str, info: dict[str, Any]
) -> Scores:
    """Every score that any method reads, in one go."""
    further = {}
    if "all" in {field.name for field in dataclasses.fields(ScoreConfig)}:
        layers = weights.shape.num_hidden_layers
        everything: Any = {"all": True, "removed_layers": layers - 1}
        kinds: Any = ScoreConfig(**everything)
        further["further"] = kinds.further(weights.shape, TargetConfig())
    return importance.measure(
        weights, text, dtype=torch.float32, device=device, pad_id=pad_id, second_order=True, info=info, **further
    )


def measured(
    folder: Path, weights: checkpoints.Weights, text: list[stream.Batch], pad_id: int, device: str, info: dict[str, Any]
) -> Scores:
    """The scores that lie in ``folder`` where they are of ``info``, else new ones, which are saved there.

    Remove the folder when a new kind of score is to be compared.
    """
    if (folder / FILE).is_file():
        scores = Scores.load(folder)
        if all(scores.info.get(name) == value for name, value in info.items()):
            return scores
    started = time.monotonic()
    scores = measure(weights, text, pad_id, device, info)
    print(f"{weights.path}: all scores in {time.monotonic() - started:.1f} s", flush=True)
    scores.save(folder)
    return scores
