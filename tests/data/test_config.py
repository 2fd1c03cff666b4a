import pytest
from jsonargparse import ArgumentParser

from hivetrain.data import EmbeddedCorpus, FolderCorpus, HubCorpus, RefinedWebDataModule

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("corpus", "kind"),
    [
        ("null", EmbeddedCorpus),
        ("{class_path: hivetrain.data.EmbeddedCorpus}", EmbeddedCorpus),
        ("{class_path: hivetrain.data.FolderCorpus, init_args: {path: text, heldout_units: 2}}", FolderCorpus),
        (f"{{class_path: hivetrain.data.HubCorpus, init_args: {{repository: a/b, revision: {COMMIT}}}}}", HubCorpus),
    ],
)
def test_yaml_chooses_the_corpus_by_class_path(tmp_path, corpus, kind):
    config = tmp_path / "config.yaml"
    config.write_text(
        "data:\n  class_path: hivetrain.data.RefinedWebDataModule\n  init_args:\n"
        f"    corpus: {corpus}\n    tokenizer: gpt2\n    block_size: 256\n    cache_dir: {tmp_path}\n"
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(RefinedWebDataModule, "data")
    data = parser.instantiate_classes(parser.parse_args([f"--config={config}"])).data
    assert isinstance(data, RefinedWebDataModule)
    assert type(data.corpus) is kind
    assert (data.block_size, data.vocabulary_size) == (256, 50257)
    assert not list(tmp_path.glob("*.sqlite")), "a constructor must not open anything"
