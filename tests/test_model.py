import copy
import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F
from toy_data import CountingData

from hivetrain.errors import UserError
from hivetrain.model import CausalLM, decay_groups, lr_factor

TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32}


def tiny(**arguments) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(**{"config": TINY, "vocab_size": 64, **arguments})


def rows(count: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(1))


def quiet_trainer(**arguments) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def test_loss_equals_the_one_of_transformers() -> None:
    model = tiny()
    ids = rows()
    assert torch.allclose(model.loss({"input_ids": ids}), model.lm(input_ids=ids, labels=ids).loss, atol=1e-6)


def test_loss_before_training_is_that_of_a_uniform_guess() -> None:
    assert tiny().loss({"input_ids": rows(8)}).item() == pytest.approx(math.log(64), abs=0.1)


def test_padding_neither_counts_nor_changes_what_comes_before_it() -> None:
    model = tiny()
    ids = rows(1, 12)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 5, dtype=torch.long)], dim=1)
    alone = model.loss({"input_ids": ids})
    assert torch.allclose(model.loss({"input_ids": padded, "attention_mask": mask}), alone, atol=1e-6)
    positions = torch.arange(17)[None]
    batch = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    assert torch.allclose(model.loss(batch), alone, atol=1e-6)


@pytest.mark.parametrize("with_mask", [False, True])
def test_restarting_positions_keep_documents_apart(with_mask: bool) -> None:
    model = tiny()
    first, second = rows(1, 7), rows(2, 5)[1:]
    ids = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    document = torch.cat([torch.zeros(7), torch.ones(5)])
    same = (document[:, None] == document[None, :]).tril()[None, None]
    packed = model(ids, position_ids=positions, attention_mask=same if with_mask else None)
    assert torch.allclose(packed[:, 7:], model(second), atol=1e-5)
    assert not torch.allclose(model(ids)[:, 7:], model(second), atol=1e-3)


def test_another_architecture_by_name() -> None:
    config = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    model = CausalLM("llama", config={**config, "num_key_value_heads": 2}, vocab_size=64)
    assert model.lm.config.model_type == "llama"
    assert model.loss({"input_ids": rows()}).isfinite()


def test_an_encoder_architecture_does_not_see_what_it_predicts() -> None:
    config = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    model = CausalLM("bert", config=config, vocab_size=64).eval()
    ids = rows(1)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 64
    assert torch.equal(model(ids)[:, :-1], model(changed)[:, :-1])


def test_dropout_is_off_by_default_and_one_option_sets_every_kind() -> None:
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    assert [getattr(tiny().lm.config, name) for name in names] == [0.0, 0.0, 0.0]
    mixed = tiny(dropout=0.2, config={**TINY, "attn_pdrop": 0.3}).lm.config
    assert [getattr(mixed, name) for name in names] == [0.2, 0.2, 0.3]
    model = tiny().train()
    assert torch.equal(model(rows()), model(rows()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"config": {"n_layre": 2}}, "did you mean 'n_layer'"),
        ({"config": {"n_layer": "two"}}, "model.config.n_layer"),
        ({"config": {"n_embd": 65, "n_head": 2}}, "divisible"),
        ({"model": "t5"}, "t5"),
        ({"model": "./no/such/directory"}, "no/such/directory"),
        ({"warmup_epochs": 5, "total_epochs": 5}, "total_epochs"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_sentence(arguments, words, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=words) as refusal:
        CausalLM(**arguments)
    assert "\n" not in str(refusal.value)


def test_pretrained_params_come_from_a_local_directory(tmp_path) -> None:
    saved = tiny()
    saved.lm.save_pretrained(tmp_path)
    loaded = CausalLM(str(tmp_path), pretrained=True)
    assert torch.equal(loaded(rows()), saved(rows()))
    assert loaded.lm.config.resid_pdrop == 0.0
    assert loaded.lm.training
    fresh = CausalLM(str(tmp_path), pretrained=False)
    assert not torch.equal(fresh(rows()), saved(rows()))


def test_pretrained_params_that_do_not_fit_are_refused(tmp_path) -> None:
    tiny().lm.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lack 12 of the model's params"):
        CausalLM(str(tmp_path), pretrained=True, config={"n_layer": 3})
    with pytest.raises(UserError, match="cannot load the params"):
        CausalLM(str(tmp_path), pretrained=True, vocab_size=65)


def test_pickled_params_are_not_loaded(tmp_path) -> None:
    model = tiny()
    model.lm.config.save_pretrained(tmp_path)
    torch.save(model.lm.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        CausalLM(str(tmp_path), pretrained=True)


def test_matrices_are_decayed_biases_and_norms_are_not_and_tied_params_come_once() -> None:
    model = tiny()
    names = {param: name for name, param in model.named_parameters()}
    decayed, spared = decay_groups(model.named_parameters(), 0.1)
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert all(names[param].endswith(".bias") or ".ln_" in names[param] for param in spared["params"])
    assert not any(names[param].endswith(".bias") or ".ln_" in names[param] for param in decayed["params"])
    params = decayed["params"] + spared["params"]
    assert len(params) == len(set(params)) == len(list(model.parameters()))
    assert model.lm.transformer.wte.weight is model.lm.lm_head.weight
    assert sum(param is model.lm.lm_head.weight for param in params) == 1


def test_learning_rate_warms_up_then_follows_a_cosine_to_its_floor() -> None:
    factors = [lr_factor(epoch, warmup_epochs=4, total_epochs=12, min_lr_ratio=0.2) for epoch in range(16)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.6)
    assert factors[12:] == pytest.approx([0.2] * 4)
    assert factors[4:13] == sorted(factors[4:13], reverse=True)
    assert lr_factor(99, warmup_epochs=4, total_epochs=None, min_lr_ratio=0.2) == 1.0
    assert lr_factor(0, warmup_epochs=0, total_epochs=None, min_lr_ratio=0.2) == 1.0


def test_training_equals_a_plain_loop_with_torch_adamw_and_clipping() -> None:
    # A large eps: the gradient of a key's bias is rounding noise, which Adam would scale up to full steps.
    model = tiny(learning_rate=1e-2, warmup_epochs=2, total_epochs=6, eps=1e-4)
    reference = copy.deepcopy(model.lm)
    data = CountingData(rows=24)
    quiet_trainer(max_steps=6, gradient_clip_val=1.0).fit(model, data)

    params = dict(reference.named_parameters())
    groups = [
        {"params": [param for param in params.values() if param.ndim >= 2], "weight_decay": 0.1},
        {"params": [param for param in params.values() if param.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-4)
    for step, batch in enumerate(data.train_dataloader()):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * lr_factor(step, 2, 6, 0.1)
        ids = batch["input_ids"]
        logits = reference(input_ids=ids).logits
        F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, param in model.lm.named_parameters():
        assert torch.allclose(param, params[name], atol=1e-5), name


def test_loss_and_perplexity_are_logged() -> None:
    model = tiny(learning_rate=1e-2)
    trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(model, CountingData(rows=10))  # the last batch holds 2 rows: means must be over rows
    metrics = trainer.callback_metrics
    assert metrics["train/perplexity"].item() == pytest.approx(math.exp(metrics["train/loss"].item()), rel=1e-4)
    whole = CountingData(rows=10, batch_size=10)
    expected = model.eval().loss(next(iter(whole.val_dataloader()))).item()
    assert metrics["val/loss"].item() == pytest.approx(expected, abs=1e-5)
    assert metrics["val/perplexity"].item() == pytest.approx(math.exp(expected), rel=1e-4)
    assert trainer.test(model, whole, verbose=False)[0]["test/loss"] == pytest.approx(expected, abs=1e-5)
    surprises = torch.cat(trainer.predict(model, whole))
    assert surprises.shape == (10,)
    assert surprises.mean().item() == pytest.approx(expected, abs=1e-5)


def test_data_that_does_not_fit_is_refused_before_training() -> None:
    with pytest.raises(UserError, match="set model.vocab_size to 65"):
        quiet_trainer(max_steps=1).fit(tiny(), CountingData(vocabulary_size=65))
    with pytest.raises(UserError, match="block_size is 33"):
        quiet_trainer(max_steps=1).fit(tiny(), CountingData(block_size=33))


def test_a_checkpoint_needs_nothing_but_itself(tmp_path) -> None:
    tiny().lm.save_pretrained(tmp_path / "pretrained")
    model = CausalLM(str(tmp_path / "pretrained"), pretrained=True, learning_rate=1e-2)
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(model, CountingData())
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    (tmp_path / "pretrained" / "model.safetensors").unlink()
    again = CausalLM.load_from_checkpoint(tmp_path / "trained.ckpt", weights_only=True)
    assert torch.equal(again(rows()), model(rows()))
    assert again.hparams["learning_rate"] == 1e-2


def test_generation_repeats_itself_and_leaves_no_trace() -> None:
    model = tiny().train()
    prompt = rows(1, 3)
    state = torch.get_rng_state()
    first = model.generate(prompt, 40, seed=3)
    assert first.shape == (1, 43)  # beyond the context of 32
    assert torch.equal(first, model.generate(prompt, 40, seed=3))
    assert not torch.equal(first, model.generate(prompt, 40, seed=4))
    assert torch.equal(state, torch.get_rng_state())
    assert model.lm.training
    greedy = model.generate(prompt, 1, temperature=0)
    assert greedy[0, -1] == model(prompt)[0, -1].argmax()
