"""Answers are drawn from the model's own distribution, by noise that belongs to the answer and to nothing else."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaForCausalLM

import assistants
from llamita import chat, checkpoints
from llamita.align import generation
from llamita.align.generation import Prompt, SamplingConfig, Scored, TransformersSampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assistants.assistant(tmp_path_factory.mktemp("generation") / "model")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> chat.Encoder:
    return chat.Encoder(checkpoints.load_tokenizer(folder))


@pytest.fixture
def model(folder: Path) -> LlamaForCausalLM:
    """In float64: what holds up to rounding then holds."""
    loaded = checkpoints.load_model(folder, dtype=torch.float64)
    return loaded.train(False)


@pytest.fixture(scope="module")
def prompts(encoder: chat.Encoder) -> list[Prompt]:
    texts = ["Hi", "What is 3 + 4?", "Tell me a long story about a cat that is an answer.", "b"]
    return [Prompt(f"p{place}", encoder.prompt(assistants.user(text))) for place, text in enumerate(texts)]


def drawn(model: Any, encoder: chat.Encoder, prompts: Any, *, samples: int = 3, seed: int = 0, **changes: Any) -> Any:
    config = SamplingConfig(**{"max_new_tokens": 8, "batch_rows": 5, "temperature": 1.2, "top_p": 0.95, **changes})
    return TransformersSampler(model, encoder, config).draw(prompts, samples=samples, seed=seed)


@given(
    shares=st.lists(st.integers(0, 20), min_size=2, max_size=9).filter(any),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_a_token_is_drawn_where_the_number_falls_in_its_share(shares: list[int], uniform: float) -> None:
    """Against the definition: the first token whose share, added to those before, is above the number."""
    logits = torch.tensor([[float(share) for share in shares]], dtype=torch.float64).log()
    token = int(generation.invert(logits, torch.tensor([uniform], dtype=torch.float64), temperature=1, top_p=1))
    border = [sum(shares[: place + 1]) / sum(shares) for place in range(len(shares))]
    assert shares[token] > 0
    assert border[token] > uniform - 1e-12
    assert token == 0 or border[token - 1] <= uniform + 1e-12


def test_draws_have_the_softened_distribution_cut_at_top_p() -> None:
    """20,000 numbers spread evenly meet each token as often as its share says, to a part in 10,000."""
    logits = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.0])
    even = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    tokens = generation.invert(logits.expand(20000, 5), even, temperature=2.0, top_p=0.75)
    shares = (logits.double() / 2).softmax(-1)
    kept = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)  # 0.36 + 0.28 + 0.14
    assert float((shares * torch.tensor([0, 1, 0, 1, 0])).sum()) < 0.75 <= float((shares * kept).sum())
    expected = shares * kept / (shares * kept).sum()
    torch.testing.assert_close(tokens.bincount(minlength=5) / 20000.0, expected.float(), atol=1e-4, rtol=0)


def test_a_number_just_below_one_takes_the_last_token_that_has_a_share() -> None:
    logits = torch.full((1, 128256), -40.0)
    logits[0, 7] = 5.0
    logits[0, -5:] = -torch.inf
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert int(generation.invert(logits, almost_one, temperature=1, top_p=1)) <= 128256 - 6


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not numbers"):
        generation.invert(torch.full((1, 4), torch.nan), torch.zeros(1), temperature=1, top_p=1)


def test_an_answer_depends_on_neither_its_batch_nor_its_neighbours(
    model: LlamaForCausalLM, encoder: chat.Encoder, prompts: list[Prompt]
) -> None:
    whole = drawn(model, encoder, prompts)
    assert drawn(model, encoder, prompts, batch_rows=1) == whole
    assert drawn(model, encoder, prompts[::-1], batch_rows=7) == whole[::-1]
    assert [drawn(model, encoder, [prompt])[0] for prompt in prompts] == whole
    assert [answers[:1] for answers in whole] == drawn(model, encoder, prompts, samples=1)
    assert drawn(model, encoder, prompts, seed=1) != whole
    assert len({answer.text for answers in whole for answer in answers}) > 6


def test_a_round_draws_other_answers(model: LlamaForCausalLM, encoder: chat.Encoder, prompts: list[Prompt]) -> None:
    sampler = TransformersSampler(model, encoder, SamplingConfig(max_new_tokens=8))
    first, second = (sampler.draw(prompts, samples=2, seed=0, number=number) for number in (0, 1))
    assert first != second


def test_greedy_answers_are_those_of_generate_alone(
    model: LlamaForCausalLM, encoder: chat.Encoder, prompts: list[Prompt]
) -> None:
    """The directory's own generation settings change nothing, and are the model's again afterwards."""
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    model.generation_config = own
    found = drawn(model, encoder, prompts, temperature=0, samples=1)
    assert model.generation_config is own
    for prompt, [answer] in zip(prompts, found, strict=True):
        ids = list(prompt.ids)
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in encoder.stop_ids:
                break
        assert answer == generation.answer_of(ids[len(prompt.ids) :], encoder)


def test_an_answer_that_did_not_end_is_told_from_one_that_did(encoder: chat.Encoder) -> None:
    pad, stop = encoder.borders.pad_id, encoder.stop_ids[0]
    letter = encoder._ids("a")
    assert generation.answer_of([*letter, stop, pad, pad], encoder) == generation.Answer("a", 2, finished=True)
    assert generation.answer_of([*letter, *letter], encoder) == generation.Answer("aa", 2, finished=False)


def test_log_probabilities_are_those_of_each_text_alone(
    model: LlamaForCausalLM, encoder: chat.Encoder, prompts: list[Prompt]
) -> None:
    texts = [Scored.answer(prompt.ids, [300 + place, 5, 7][: 1 + place]) for place, prompt in enumerate(prompts)]
    total, count = generation.log_probabilities(model, texts, batch_rows=3, chunk_values=900)
    for place, text in enumerate(texts):
        log_shares = model(torch.tensor([text.ids])).logits[0].log_softmax(-1).detach()
        expected = sum(log_shares[at - 1, text.ids[at]] for at, scored in enumerate(text.scored) if scored)
        assert float(total[place]) == pytest.approx(float(expected), abs=1e-9)
    assert count.tolist() == [1, 2, 3, 3]


def test_a_prompt_that_leaves_no_room_is_named() -> None:
    with pytest.raises(ValueError, match=r"prompt p has 5 tokens: .*max_new_tokens=8 .* 12 positions of model\.path"):
        generation.check_lengths([Prompt("p", [0] * 5)], SamplingConfig(max_new_tokens=8), 12, "model.path")


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}, {"batch_rows": 0}]
)
def test_a_setting_that_cannot_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"sampling\.{next(iter(wrong))} must be"):
        SamplingConfig(**wrong)


def test_a_backend_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="vllm is not installed"):
        SamplingConfig(backend=generation.Backend.vllm).check()


def test_what_no_model_holds_any_more_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append("all"))
    generation.give_back()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    generation.give_back()
    assert given == ["all"]


def test_vllm_gets_one_request_to_an_answer_with_its_own_seed(
    monkeypatch: pytest.MonkeyPatch, encoder: chat.Encoder, prompts: list[Prompt], folder: Path
) -> None:
    """By a stand-in, which answers every request with its first id; vLLM itself runs where it is installed."""
    asked: list[Any] = []

    class LLM:
        def __init__(self, **settings: Any) -> None:
            assert settings["model"] == str(folder)
            assert settings["trust_remote_code"] is False

        def generate(self, requests: list[Any], settings: list[Any], use_tqdm: bool) -> list[Any]:
            asked.extend(settings)
            ids = [[request["prompt_token_ids"][-1], encoder.stop_ids[0]] for request in requests]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=one)]) for one in ids]

    fake = SimpleNamespace(LLM=LLM, SamplingParams=lambda **settings: settings, __spec__=object())
    monkeypatch.setitem(sys.modules, "vllm", fake)
    config = SamplingConfig(backend=generation.Backend.vllm, max_new_tokens=9)
    found = generation.VllmSampler(folder, encoder, config).draw(prompts, samples=2, seed=3)
    assert [len(answers) for answers in found] == [2] * len(prompts)
    assert len({settings["seed"] for settings in asked}) == 2 * len(prompts)
    assert {settings["max_tokens"] for settings in asked} == {9}
    assert all(answer.finished for answers in found for answer in answers)
