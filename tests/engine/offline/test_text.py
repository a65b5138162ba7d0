"""Tokenizer, perplexity and profile: what turns text into facts about a model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.container import Container
from engine.errors import ContainerError, RequestError
from engine.experts.profile import PathProfile
from engine.offline.accuracy.model import MappedExperts, OfflineModel, save_logits
from engine.offline.accuracy.passages import TextPair, cut, read_pairs, rouge_2
from engine.offline.accuracy.perplexity import evaluate
from engine.offline.importing.importer import import_checkpoint
from engine.offline.routing.activations import profile_texts
from engine.offline.tokenizer import Tokenizer
from engine.protocol import Passage
from engine.quantize import Format
from tests.engine.offline.conftest import TINY


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> OfflineModel:
    folder = tmp_path_factory.mktemp("tiny")
    return OfflineModel(import_checkpoint(TINY.write(folder / "hf"), folder / "m.emoe"))


def test_text_survives_the_tokenizer(shipped: Container) -> None:
    tokenizer = Tokenizer.from_container(shipped.path)
    text = "In the beginning – ἀρχή 😀\n\tif x: return 1"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode([10**6]) == ""


def test_text_that_is_no_text(shipped: Container) -> None:
    with pytest.raises(RequestError, match="not Unicode at character 1"):
        Tokenizer.from_container(shipped.path).encode("a\udc80")


def test_a_container_without_a_tokenizer(tiny: OfflineModel) -> None:
    with pytest.raises(RequestError, match="holds no tokenizer"):
        Tokenizer.from_container(tiny.container.path)
    assert Tokenizer.find(tiny.container.path) is None


def test_windows_cover_the_text_once(tiny: OfflineModel) -> None:
    def windows(context: int) -> list[tuple[int, ...]]:
        passages = cut([1, 2, 3, 4, 5], context, tiny.config)
        assert all(len(passage.prompt) == 1 for passage in passages)
        return [passage.prompt + passage.continuation for passage in passages]

    assert windows(2) == [(1, 2), (3, 4)]  # a last window of one token predicts nothing
    assert windows(3) == [(1, 2, 3), (4, 5)]
    with pytest.raises(RequestError, match="context of 1"):
        windows(1)


def test_perplexity_is_that_of_the_logits(tiny: OfflineModel) -> None:
    tokens = [5, 9, 2, 33, 7]
    nats = 0.0
    for window in ([5, 9, 2], [33, 7]):
        logits = tiny.logits(window)
        for position, token in enumerate(window[1:]):
            shares = np.exp(logits[position].astype(np.float64))
            nats -= math.log(shares[token] / shares.sum())
    result = evaluate(tiny, tokens, text_bytes=20, context=3)
    assert (result.tokens, result.scored_tokens) == (5, 3)
    assert result.nats_per_token == pytest.approx(nats / 3, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / 3), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats / 3 / math.log(2) * 5 / 20, rel=1e-6)
    with pytest.raises(RequestError, match="fewer than two tokens"):
        evaluate(tiny, [5], text_bytes=1)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tmp_path: Path) -> None:
    class Silent(OfflineModel):
        def answers(self, passage: Passage) -> np.ndarray:
            return np.zeros((len(passage.continuation), 40), np.float32)

    container = import_checkpoint(TINY.write(tmp_path / "hf"), tmp_path / "m.emoe")
    assert evaluate(Silent(container), range(7), text_bytes=7).perplexity == pytest.approx(40)


def test_token_ids_and_lengths_are_checked(tiny: OfflineModel) -> None:
    with pytest.raises(RequestError, match=r"token id 40 is not in the vocabulary of .*: 0 to 39"):
        tiny.logits([1, 40])
    with pytest.raises(RequestError, match="at least one"):
        tiny.logits([])
    with pytest.raises(RequestError, match="257 positions"):
        tiny.logits([1] * 257)


def test_a_sequence_longer_than_a_chunk_of_prefill(shipped: Container) -> None:
    model = OfflineModel(shipped)
    tokens = [int(t) for t in np.random.RandomState(0).randint(3, 4096, 600)]
    assert model.routing(Passage(tuple(tokens[:1]), tuple(tokens[1:]))).shape == (600, 8, 2)
    np.testing.assert_allclose(model.logits(tokens)[:20], model.logits(tokens[:20]), atol=1e-4)


def test_the_profile_counts_what_the_routers_chose(tiny: OfflineModel, tmp_path: Path) -> None:
    texts = [list(range(2, 20)), [7, 8, 9]]
    profile = profile_texts(tiny, texts, context=8)
    assert (profile.layers, profile.experts, profile.tokens) == (2, 3, 18 + 3)
    counts = np.zeros((2, 3), int)
    for window in (texts[0][:8], texts[0][8:16], texts[0][16:], texts[1]):
        for layer, chosen in enumerate(tiny.routing(Passage(tuple(window[:1]), tuple(window[1:]))).transpose(1, 0, 2)):
            counts[layer] += np.bincount(chosen.ravel(), minlength=3)
    assert [[layer.get(e, 0) for e in range(3)] for layer in profile.marginal] == counts.tolist()
    profile.save(str(tmp_path / "p"))
    assert PathProfile.load(str(tmp_path / "p")) == profile
    with pytest.raises(RequestError, match="fewer than two tokens"):
        profile_texts(tiny, [[1]])


def test_a_damaged_expert_is_no_answer(tiny: OfflineModel, tmp_path: Path) -> None:
    record = tiny.container.primary[0, 1]
    content = bytearray(Path(tiny.container.path).read_bytes())
    content[record.offset + 7] ^= 0x40
    path = tmp_path / "damaged.emoe"
    path.write_bytes(content)
    with pytest.raises(ContainerError, match="layer 0 expert 1 is damaged"):
        list(
            MappedExperts(Container.open(str(path))).fetch(
                0, np.array([[1, 2]]), np.array([[0.5, 0.5]]), np.zeros((1, 8), np.float32)
            )
        )


def test_logits_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    save_logits(tmp_path / "o.npy", np.ones((2, 3), np.float32))
    loaded = np.load(tmp_path / "o.npy")
    assert (loaded.dtype, loaded.shape) == (np.float32, (2, 3))
    with pytest.raises(RequestError, match="cannot be written"):
        save_logits(tmp_path / "no" / "o.npy", loaded)
    with pytest.raises(RequestError, match="cannot be written"):
        save_logits(tmp_path, loaded)
    assert [p.name for p in tmp_path.iterdir()] == ["o.npy"]


def test_agreement_with_a_reference_is_that_of_the_logits(tiny: OfflineModel, tmp_path: Path) -> None:
    coarse = import_checkpoint(TINY.write(tmp_path / "hf"), tmp_path / "coarse.emoe", [Format("int2")])
    tokens = [int(t) for t in np.random.RandomState(1).randint(2, 40, 30)]
    found = evaluate(OfflineModel(coarse), tokens, 30, 10, reference=tiny)
    same, right, divergence = 0, 0, 0.0
    for window in (tokens[:10], tokens[10:20], tokens[20:]):
        p, q = (m.logits(window)[:-1].astype(np.float64) for m in (tiny, OfflineModel(coarse)))
        p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (p, q))
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        right += int((q.argmax(axis=1) == window[1:]).sum())
        divergence += float((p * np.log(p / q)).sum())
    assert found.top1_agreement == pytest.approx(same / 27)
    assert found.top1_accuracy == pytest.approx(right / 27)
    assert found.divergence_nats == pytest.approx(divergence / 27, rel=1e-4)
    assert 0 < same < 27
    assert evaluate(tiny, tokens, 30, 10, reference=tiny).top1_agreement == 1
    other = import_checkpoint(replace(TINY, vocab=41).write(tmp_path / "other"), tmp_path / "other.emoe")
    with pytest.raises(RequestError, match="vocabulary of 41"):
        evaluate(tiny, tokens, 30, 10, reference=OfflineModel(other))


@pytest.mark.parametrize("torn", [0, 1, 5])
def test_a_profile_that_was_interrupted_goes_on(torn: int, tiny: OfflineModel, tmp_path: Path) -> None:
    text = [int(t) for t in np.random.RandomState(2).randint(2, 40, 60)]
    profile_texts(tiny, [text], 8).save(str(tmp_path / "whole.json"))
    journal = tmp_path / "p.partial"

    def interrupt(done: int, of: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile_texts(tiny, [text], 8, interrupt, journal)
    data = journal.read_bytes()
    journal.write_bytes(data[: len(data) - torn])
    computed = []
    routing = tiny.routing
    tiny.routing = lambda passage: computed.append(passage) or routing(passage)  # type: ignore[method-assign, func-returns-value]
    try:
        profile_texts(tiny, [text], 8, journal=journal).save(str(tmp_path / "resumed.json"))
    finally:
        del tiny.routing  # type: ignore[method-assign]
    assert len(computed) == 8 - 4 + (torn > 0)
    assert (tmp_path / "resumed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not journal.exists()


def test_what_is_left_of_another_profile_is_not_taken_up(tiny: OfflineModel, tmp_path: Path) -> None:
    def interrupt(done: int, of: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    journal = tmp_path / "p.partial"
    with pytest.raises(KeyboardInterrupt):
        profile_texts(tiny, [[5, 6, 7, 8]], 2, interrupt, journal)
    found = profile_texts(tiny, [[9, 10, 11, 12]], 2, journal=journal)
    assert found == profile_texts(tiny, [[9, 10, 11, 12]], 2)
    with pytest.raises(RequestError, match="cannot be written"):
        profile_texts(tiny, [[5, 6]], 2, journal=tmp_path / "no" / "p.partial")


def test_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"input": "a b", "target": "c"}\n\n{"dialogue": "d", "summary": "e", "id": 3}\n')
    assert read_pairs(path) == [TextPair("a b", "c"), TextPair("d", "e")]
    for text, words in (("", "no pairs"), ("{}", "line 1 has no text"), ('{"input": "a", "target": ""}', "line 1"),
                        ("\n[", "line 2 is not JSON"), ('{"input": 3, "target": "b"}', "line 1")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(RequestError, match=words):
            read_pairs(path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_pairs(tmp_path / "none")


def test_rouge_2_is_the_overlap_of_pairs_of_words() -> None:
    # "the cat", "cat sat" of "the cat", "cat ran", "ran off": one in common, precision 1/2, recall 1/3
    assert rouge_2(["the cat ran off"], ["The cat sat"]) == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
