"""Evaluation against closed forms and a dense float64 oracle."""

from __future__ import annotations

import builtins
import copy
import itertools
import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llamita import evaluate, harness
from llamita.data import tokens

TASKS = Path(__file__).resolve().parent.parent / "tasks"
LOCAL_TASKS = ["llamita_general_choice", "llamita_python_choice", "llamita_python_cloze"]


def byte_level_tokenizer(texts: list[str], vocab_size: int = 300) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def packed(rows: int = 5, length: int = 24, vocab_size: int = 128, seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows of two documents and padding each, one row per batch; the last row has no label at all."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for row in range(rows):
        ids = torch.randint(vocab_size, (1, length), generator=generator)
        cut, end = 5 + row, length - 3
        position = torch.cat([torch.arange(cut), torch.arange(end - cut), torch.arange(length - end)])[None]
        labels = ids.clone()
        labels[position == 0] = -100
        labels[:, end:] = -100
        if row == rows - 1:
            labels[:] = -100
        batches.append({"input_ids": ids, "labels": labels, "position_ids": position})
    return batches


def together(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def uniform_bytes(vocab_size: int = 128) -> Tensor:
    return torch.arange(vocab_size) % 5


def another(model: LlamaForCausalLM, seed: int, vocab_size: int = 128) -> LlamaForCausalLM:
    """A Llama of the same proportions with other random weights."""
    config = copy.deepcopy(model.config)
    config.vocab_size = vocab_size
    torch.manual_seed(seed)
    other = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return other


def test_a_uniform_model_costs_the_logarithm_of_its_vocabulary(tiny: LlamaForCausalLM) -> None:
    """loss = ln V, perplexity = V, bits per byte = tokens · log2 V / bytes, all in closed form."""
    batches, sizes = packed(), uniform_bytes()
    with torch.no_grad():
        tiny.lm_head.weight.zero_()
    rows = evaluate.measure(tiny, batches, sizes)
    values = evaluate.summary(rows)
    targets = torch.cat([batch["labels"][batch["labels"] != -100] for batch in batches])
    assert values["loss"].value == pytest.approx(math.log(128), rel=1e-6)
    assert values["perplexity"].value == pytest.approx(128, rel=1e-5)
    expected = len(targets) * math.log2(128) / float(sizes[targets].sum())
    assert values["bits_per_byte"].value == pytest.approx(expected, rel=1e-6)
    assert values["loss"].stderr == pytest.approx(0, abs=1e-6)


def test_a_model_is_its_own_perfect_student(tiny: LlamaForCausalLM) -> None:
    values = evaluate.summary(evaluate.measure(tiny, packed(), uniform_bytes(), teacher=tiny))
    assert values["kl"] == evaluate.Estimate(0.0, 0.0)
    assert values["top1_agree"] == evaluate.Estimate(1.0, 0.0)


def test_sums_equal_a_dense_float64_oracle(tiny: LlamaForCausalLM) -> None:
    """Every document alone, its whole logits, textbook formulas."""
    student, teacher = another(tiny, 1).double(), another(tiny, 2).double()
    batches, sizes = packed(), uniform_bytes()
    nll = kl = agreed = tokens = utf8_bytes = 0.0
    with torch.no_grad():
        for batch in batches[:-1]:
            starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
            for start, end in itertools.pairwise(starts):
                ids = batch["input_ids"][:, start:end]
                p = teacher(ids, use_cache=False).logits[0, :-1].softmax(-1)
                q = student(ids, use_cache=False).logits[0, :-1].softmax(-1)
                target = ids[0, 1:]
                nll -= float(q.log()[torch.arange(len(target)), target].sum())
                kl += float((p * (p / q).log()).sum())
                agreed += float((p.argmax(-1) == q.argmax(-1)).sum())
                tokens += len(target)
                utf8_bytes += float(sizes[target].sum())
    values = evaluate.summary(evaluate.measure(student, batches, sizes, teacher=teacher))
    assert values["loss"].value == pytest.approx(nll / tokens, rel=1e-10)
    assert values["bits_per_byte"].value == pytest.approx(nll / math.log(2) / utf8_bytes, rel=1e-10)
    assert values["kl"].value == pytest.approx(kl / tokens, rel=1e-10)
    assert values["top1_agree"].value == pytest.approx(agreed / tokens, rel=1e-10)


def test_logits_of_a_bfloat16_model_are_not_rounded(tiny: LlamaForCausalLM) -> None:
    """Against float64 on the same rounded weights and hidden states: an error of 1e-6, not one of 1e-3."""
    model, batch = another(tiny, 1).bfloat16(), together(packed())
    fields = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    predicts = batch["labels"][:, 1:] != evaluate.IGNORE
    with torch.no_grad():
        hidden = model.model(**fields).last_hidden_state[:, :-1][predicts].double()
        logits = hidden @ model.lm_head.weight.double().T
    nll = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:][predicts], reduction="sum")
    assert float(evaluate.row_sums(model, batch, uniform_bytes()).nll.sum()) == pytest.approx(nll.item(), rel=1e-6)


@pytest.mark.parametrize("batch_rows", [2, 5])
def test_the_batch_size_changes_nothing(tiny: LlamaForCausalLM, batch_rows: int) -> None:
    student, teacher = another(tiny, 1).double(), another(tiny, 2).double()
    batches = packed()
    grouped = [together(batches[at : at + batch_rows]) for at in range(0, len(batches), batch_rows)]
    one = evaluate.measure(student, batches, uniform_bytes(), teacher=teacher)
    many = evaluate.measure(student, grouped, uniform_bytes(), teacher=teacher)
    for name in ("tokens", "utf8_bytes", "nll", "kl", "top1"):
        torch.testing.assert_close(getattr(one, name), getattr(many, name), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk_values", [1, 128 * 3, 2**20])
def test_the_chunk_size_changes_nothing(tiny: LlamaForCausalLM, chunk_values: int) -> None:
    batch, teacher = together(packed()), another(tiny, 2)
    whole = evaluate.row_sums(tiny, batch, uniform_bytes(), teacher=teacher)
    parts = evaluate.row_sums(tiny, batch, uniform_bytes(), teacher=teacher, chunk_values=chunk_values)
    assert parts.kl is not None
    assert whole.kl is not None
    torch.testing.assert_close(parts.nll, whole.nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.kl, whole.kl, rtol=1e-6, atol=1e-6)


def test_no_more_logits_exist_at_once_than_allowed(tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = evaluate.project

    def project(hidden_TD: Tensor, head_VD: Tensor) -> Tensor:
        seen.append(len(hidden_TD) * len(head_VD))
        return real(hidden_TD, head_VD)

    monkeypatch.setattr(evaluate, "project", project)
    evaluate.row_sums(tiny, together(packed()), uniform_bytes(), chunk_values=128 * 7)
    assert max(seen) == 128 * 7
    assert sum(seen) == 128 * int(sum((batch["labels"] != -100).sum() for batch in packed()))


def test_a_document_does_not_see_the_one_before_it(tiny: LlamaForCausalLM) -> None:
    batch = packed()[0]
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["input_ids"][:, :5] = (changed["input_ids"][:, :5] + 1) % 128
    # The second document's labels alone.
    for item in (batch, changed):
        item["labels"][:, :5] = -100
    one = evaluate.row_sums(tiny, batch, uniform_bytes())
    two = evaluate.row_sums(tiny, changed, uniform_bytes())
    torch.testing.assert_close(one.nll, two.nll)


def test_rows_without_a_label_are_left_out_and_nothing_but_such_rows_is_an_error(tiny: LlamaForCausalLM) -> None:
    batches = packed()
    assert len(evaluate.measure(tiny, batches, uniform_bytes()).tokens) == len(batches) - 1
    with pytest.raises(ValueError, match="no supervised token"):
        evaluate.measure(tiny, batches[-1:], uniform_bytes())
    with pytest.raises(ValueError, match="no supervised token"):
        evaluate.measure(tiny, [], uniform_bytes())


def test_the_difference_of_a_model_with_itself_is_exactly_nothing(tiny: LlamaForCausalLM) -> None:
    rows = evaluate.measure(tiny, packed(), uniform_bytes())
    assert evaluate.difference(rows, rows) == {
        "loss": evaluate.Estimate(0.0, 0.0),
        "bits_per_byte": evaluate.Estimate(0.0, 0.0),
    }


def test_a_paired_difference_is_the_difference_of_the_values(tiny: LlamaForCausalLM) -> None:
    first = evaluate.measure(tiny, packed(), uniform_bytes())
    second = evaluate.measure(another(tiny, 7), packed(), uniform_bytes())
    gap = evaluate.difference(first, second)["bits_per_byte"]
    one, two = evaluate.summary(first)["bits_per_byte"], evaluate.summary(second)["bits_per_byte"]
    assert gap.value == pytest.approx(one.value - two.value, rel=1e-9)


def test_only_models_measured_on_the_same_rows_are_compared(tiny: LlamaForCausalLM) -> None:
    first = evaluate.measure(tiny, packed(), uniform_bytes())
    second = evaluate.measure(tiny, packed(rows=6), uniform_bytes())
    with pytest.raises(ValueError, match="same rows"):
        evaluate.difference(first, second)


def test_the_standard_error_is_the_spread_of_the_ratio_over_resamples() -> None:
    """Linearisation against 4,000 bootstrap resamples of rows with unequal sizes."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(20, 60, (200,), generator=generator).double()
    values = sizes * (2 + 0.5 * torch.randn(200, generator=generator, dtype=torch.float64))
    drawn = torch.randint(200, (4000, 200), generator=generator)
    spread = float((values[drawn].sum(1) / sizes[drawn].sum(1)).std())
    stderr = evaluate.ratio(values, sizes).stderr
    assert stderr == pytest.approx(spread, rel=0.05)


def test_the_standard_error_of_equal_rows_is_the_textbook_one() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 7.0], dtype=torch.float64)
    estimate = evaluate.ratio(values, torch.ones(4, dtype=torch.float64))
    assert estimate.value == 3.5
    assert estimate.stderr == pytest.approx(float(values.std()) / 2)
    assert evaluate.ratio(values[:1], torch.ones(1, dtype=torch.float64)).stderr is None


def test_bytes_of_tokens_add_up_to_bytes_of_text() -> None:
    text = "naïve Δx = 3; 你好 🦙 def f(x):\n\treturn x"
    tokenizer = byte_level_tokenizer([text, "def f(x): return x"] * 4)
    sizes = evaluate.token_bytes(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(sizes) == len(tokenizer)
    assert int(sizes[ids].sum()) == len(text.encode())


def test_special_tokens_stand_for_no_bytes_and_other_added_ones_for_their_text() -> None:
    tokenizer = byte_level_tokenizer(["abc"])
    tokenizer.add_tokens([AddedToken("größer", special=False)])
    sizes = evaluate.token_bytes(tokenizer)
    assert int(sizes[tokenizer.bos_token_id]) == 0
    assert int(sizes[tokenizer.convert_tokens_to_ids("größer")]) == 8


def test_a_tokenizer_that_is_not_byte_level_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="byte-level"):
        evaluate.token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_without_lm_eval_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[eval\]"'):
        harness.task_manager(["piqa"], None)


@pytest.mark.parametrize("nll", [math.nan, math.inf])
def test_a_model_whose_loss_is_no_number_is_an_error_and_not_a_result(nll: float) -> None:
    ones = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"loss is (nan|inf).*float16"):
        evaluate.summary(evaluate.RowSums(tokens=ones, utf8_bytes=ones, nll=ones * nll))


def test_a_model_that_is_worse_than_numbers_can_say_still_has_a_perplexity() -> None:
    ones = torch.ones(2, dtype=torch.float64)
    values = evaluate.summary(evaluate.RowSums(tokens=ones, utf8_bytes=ones, nll=ones * 5000))
    assert math.isfinite(values["perplexity"].value)
    assert values["loss"].value == 5000


@pytest.fixture
def speaker(tiny: LlamaForCausalLM) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = byte_level_tokenizer(["def main():\n    print(name)\n"])
    return another(tiny, 3, len(tokenizer)), tokenizer


def test_local_tasks_run_without_a_network(
    speaker: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """From any working directory, with every socket but a local one refused."""
    pytest.importorskip("lm_eval", reason='needs lm-eval: pip install -e ".[eval]"')
    import datasets

    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a task wanted the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    scores = harness.run_tasks(*speaker, LOCAL_TASKS, TASKS, harness.TaskConfig())
    assert scores.keys() == set(LOCAL_TASKS)
    for task in LOCAL_TASKS:
        accuracy = scores[task]["acc"]
        assert 0 <= accuracy.value <= 1
        assert accuracy.stderr is not None
    assert scores["llamita_python_cloze"]["perplexity"].value > 1


def test_no_token_of_a_local_task_reaches_over_the_border_of_prompt_and_answer() -> None:
    """lm-eval cuts the tokens of the whole where the prompt's end: a token on both sides would be lost.

    The tokenizer has Llama 3's split and has learnt these very texts by heart, so it merges all that it may.
    """
    pairs = []
    for file in sorted(TASKS.glob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(lines) == 20
        for line in lines:
            pairs += [(line["prompt"], answer) for answer in line.get("choices", [line.get("completion")])]
    tokenizer = tokens.train([f"{prompt} {answer}\n" for prompt, answer in pairs] * 20, 1000)
    for prompt, answer in pairs:
        before, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f"{prompt} {answer}")
        )
        assert whole[: len(before)] == before, (prompt, answer)
        assert len(whole) > len(before)


def test_the_right_answers_are_spread_evenly() -> None:
    for name in ("python_choice", "general_choice"):
        lines = [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]
        assert sorted(line["answer"] for line in lines) == sorted([0, 1, 2, 3] * 5)
        assert all(len(set(line["choices"])) == 4 for line in lines)


def test_a_task_path_that_is_no_directory_is_refused() -> None:
    pytest.importorskip("lm_eval", reason='needs lm-eval: pip install -e ".[eval]"')
    with pytest.raises(ValueError, match=r"task_path=no_such_folder is not a directory"):
        harness.task_manager(["llamita_python_cloze"], Path("no_such_folder"))


@pytest.mark.slow
def test_an_unknown_task_is_named_with_its_neighbours() -> None:
    pytest.importorskip("lm_eval", reason='needs lm-eval: pip install -e ".[eval]"')
    with pytest.raises(ValueError, match=r"'llamita_python_cloz'.*did you mean llamita_python_cloze"):
        harness.task_manager(["llamita_python_cloz"], TASKS)


def test_a_task_knows_the_answer_that_the_model_was_made_to_prefer(
    speaker: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    """A task whose right answers are the likelier ones scores 1, and 0 when they are swapped."""
    pytest.importorskip("lm_eval", reason='needs lm-eval: pip install -e ".[eval]"')
    model, tokenizer = speaker
    prompts = ["def", "main", "print"]
    likelier = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        logits = model(ids).logits[0, -1]
        a, b = (tokenizer.convert_tokens_to_ids(letter) for letter in "ab")
        likelier.append(0 if logits[a] > logits[b] else 1)
    for name, answers in (("right", likelier), ("wrong", [1 - answer for answer in likelier])):
        lines = [
            json.dumps({"prompt": prompt, "choices": ["a", "b"], "answer": answer})
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        text = (TASKS / "python_choice.yaml").read_text().replace("python_choice", name)
        (tmp_path / f"{name}.yaml").write_text(text)
    config = harness.TaskConfig(batch_size=2)
    scores = harness.run_tasks(model, tokenizer, ["llamita_right", "llamita_wrong"], tmp_path, config)
    assert scores["llamita_right"]["acc"].value == 1
    assert scores["llamita_wrong"]["acc"].value == 0
    one = harness.run_tasks(model, tokenizer, ["llamita_right"], tmp_path, harness.TaskConfig(limit=1))
    assert one["llamita_right"]["acc"].value == 1


def test_the_missing_data_of_a_task_is_found_before_any_model_is_asked(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason='needs lm-eval: pip install -e ".[eval]"')
    (tmp_path / "python_choice.yaml").write_text((TASKS / "python_choice.yaml").read_text())
    with pytest.raises(ValueError, match=r"the data of tasks=\['llamita_python_choice'\] is not on this machine"):
        harness.check_tasks(["llamita_python_choice"], tmp_path)


def test_the_likelihoods_of_a_bfloat16_model_are_sums_in_float32(
    speaker: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason='needs lm-eval: pip install -e ".[eval]"')
    from lm_eval.models.huggingface import HFLM

    seen: list[float] = []
    real = HFLM.loglikelihood

    def loglikelihood(self: HFLM, *args: Any, **kwargs: Any) -> Any:
        answers = real(self, *args, **kwargs)
        seen.extend(value for value, _ in answers)
        return answers

    monkeypatch.setattr(HFLM, "loglikelihood", loglikelihood)
    model, tokenizer = speaker
    harness.run_tasks(
        model.bfloat16(), tokenizer, ["llamita_python_cloze"], TASKS, harness.TaskConfig(limit=4, batch_size=1)
    )
    assert seen
    assert any(float(torch.tensor(value).bfloat16()) != value for value in seen)


def test_settings_of_tasks_have_limits() -> None:
    for name, wrong in (("limit", 0), ("num_fewshot", -1), ("batch_size", 0)):
        with pytest.raises(ValueError, match=rf"task\.{name} must be at least \d, got {wrong}"):
            harness.TaskConfig(**{name: wrong})
