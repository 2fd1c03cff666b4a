import dataclasses
import itertools
import time

import pytest
import torch

from hivetrain.data import (
    BlockClaim,
    CorpusManifest,
    DataAssignment,
    EmbeddedCorpus,
    FolderCorpus,
    RefinedWebDataModule,
    Verdict,
    block,
    check_claim,
    data_digest,
    load_encoder,
    tokens_sha256,
)
from hivetrain.data.errors import AssignmentError

BLOCK_SIZE = 128


@pytest.fixture(scope="module")
def trained():
    """A data module after twelve batches, and what its miner claims about each block of the last."""
    data = RefinedWebDataModule(block_size=BLOCK_SIZE, batch_size=60, slot=4, n_slots=9, seed=11)
    batch = list(itertools.islice(data.train_dataloader(), 12))[-1]
    claims = [
        BlockClaim(
            data.corpus.manifest.digest, data.encoder.vocabulary_sha256, at.data_pass, at.window, 4, at.unit, at.k,
            tokens_sha256(ids),
        )
        for at, ids in zip(data.consumed_addresses, batch["input_ids"], strict=True)
    ]  # fmt: skip
    return data, batch["input_ids"], claims


def check(data, claim):
    """With objects of the auditor's own."""
    corpus, encoder = EmbeddedCorpus(), load_encoder("embedded")
    digest = data_digest(corpus.manifest.digest, encoder, BLOCK_SIZE)
    assignment = DataAssignment(digest, corpus.manifest.n_train_units, seed=11, n_slots=9)
    return check_claim(claim, corpus, encoder, BLOCK_SIZE, assignment)


def test_an_auditor_rebuilds_the_blocks_bit_by_bit(trained):
    data, ids, claims = trained
    corpus, encoder = EmbeddedCorpus(), load_encoder("embedded")
    for claim, expected in list(zip(claims, ids, strict=True))[::20]:
        rebuilt = block(corpus, encoder, BLOCK_SIZE, data.assignment, claim.unit, claim.k)
        assert torch.equal(rebuilt, expected)
        assert check(data, claim) is Verdict.GENUINE


def test_every_kind_of_false_claim_is_told_apart(trained):
    data, ids, claims = trained
    claim = claims[0]
    changed = ids[0].clone()
    changed[77] += 1
    stolen = data.assignment.units(claim.window, 5)[0]
    later = data.assignment.units(claim.window + 1, 4)[0]
    lies = {
        Verdict.WRONG_CORPUS: {"manifest_digest": "0" * 64},
        Verdict.WRONG_VOCABULARY: {"vocabulary_sha256": load_encoder("gpt2").vocabulary_sha256},
        Verdict.WRONG_SLOT: {"unit": stolen},
        Verdict.WRONG_WINDOW: {"unit": later},
        Verdict.NO_SUCH_BLOCK: {"k": 100_000},
        Verdict.WRONG_TOKENS: {"tokens_sha256": tokens_sha256(changed)},
        Verdict.NOT_ASSIGNED: {"unit": 90},
    }
    for verdict, lie in lies.items():
        assert check(data, dataclasses.replace(claim, **lie)) is verdict
    assert check(data, dataclasses.replace(claim, slot=5)) is Verdict.WRONG_SLOT
    assert check(data, dataclasses.replace(claim, window=claim.window + 1)) is Verdict.WRONG_WINDOW
    assert check(data, dataclasses.replace(claim, k=-1)) is Verdict.NO_SUCH_BLOCK
    assert check(data, dataclasses.replace(claim, unit=-1)) is Verdict.NOT_ASSIGNED
    assert check(data, dataclasses.replace(claim, data_pass=-1)) is Verdict.NOT_ASSIGNED
    other_pass = check(data, dataclasses.replace(claim, data_pass=1))
    assert other_pass in (Verdict.WRONG_SLOT, Verdict.WRONG_WINDOW, Verdict.NOT_ASSIGNED)


def test_another_revision_of_the_same_files_has_another_digest(trained):
    data, _, claims = trained
    files = EmbeddedCorpus().manifest.files
    one, other = (CorpusManifest("hivetrain/embedded", revision * 40, files) for revision in "ab")
    assert one.digest != other.digest
    assert check(data, dataclasses.replace(claims[0], manifest_digest=other.digest)) is Verdict.WRONG_CORPUS


def test_the_assignment_of_other_data_is_refused(trained):
    data, _, claims = trained
    corpus, encoder = EmbeddedCorpus(), load_encoder("embedded")
    foreign = dataclasses.replace(
        data.assignment, digest=data_digest(corpus.manifest.digest, load_encoder("gpt2"), 128)
    )
    with pytest.raises(AssignmentError, match="another corpus, revision, vocabulary or block size"):
        block(corpus, encoder, BLOCK_SIZE, foreign, claims[0].unit, 0)


@pytest.mark.parametrize("tokenizer", ["embedded", "gpt2"])
def test_a_block_of_a_unit_of_500_rows_takes_less_than_one_cpu_second(tmp_path, write_parquet, documents, tokenizer):
    write_parquet(tmp_path / "a.parquet", documents[:1500], 500)
    corpus, encoder = FolderCorpus(tmp_path), load_encoder(tokenizer)
    assignment = DataAssignment(data_digest(corpus.manifest.digest, encoder, 512), 3, n_slots=3)
    begin = time.process_time()
    block(corpus, encoder, 512, assignment, 1, 100)
    assert time.process_time() - begin < 1.0
