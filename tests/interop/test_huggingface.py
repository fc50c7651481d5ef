"""Models in transformers: `Trainer` on the model as it is, Auto classes on its folders; adapters of peft."""

import json

import pytest
import torch

import mmmae
from mmmae.phantom import Phantom

pytestmark = pytest.mark.xdist_group("transformers")  # one process loads it
MODEL = {"image_size": 32, "patch": (3, 8, 8), "aux_patch": 16, "aux": {"ir": 1}, "depth": 2}


@pytest.fixture
def huggingface(transformers):
    from mmmae.interop import huggingface  # which registers the Auto classes

    return huggingface


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mmmae.fast_model("tiny", **MODEL)


@pytest.fixture
def hsi():
    return torch.randn(2, 1, 12, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def trainer(transformers, huggingface):
    """A function that makes a trainer of a model."""

    def make(model, out, **options):
        data = Phantom(6, image_size=32, aux=["ir"], missing=0.4)
        arguments = transformers.TrainingArguments(
            out,
            per_device_train_batch_size=3,
            per_device_eval_batch_size=3,
            learning_rate=1e-3,
            label_names=["hsi"],
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        collator = huggingface.trainer_collator(data.modalities)
        return transformers.Trainer(model, arguments, collator, train_dataset=data, eval_dataset=data)

    return make


def test_a_trainer_trains_the_model_as_it_is(trainer, model, tmp_path):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run = trainer(model, tmp_path, max_steps=2, gradient_checkpointing=True)
    assert run.train().training_loss > 0
    assert all(block.recompute for block in (*model.blocks, *model.decoder_blocks))
    assert {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])} == set()
    torch.manual_seed(3)
    losses = [run.evaluate()["eval_loss"], run.evaluate()["eval_loss"]]
    assert all(0 < loss < 100 for loss in losses)
    assert losses[0] != losses[1]  # masks are drawn anew


def test_a_config_stays_frozen_but_for_the_cache_that_a_trainer_turns_off(model):
    config = model.config
    config.use_cache = False
    assert config == mmmae.MMMAEConfig.preset("tiny", **MODEL)
    with pytest.raises(AttributeError, match="cannot assign to field 'depth'"):
        config.depth = 3
    with pytest.raises(AttributeError, match="cannot assign to field 'cache'"):
        config.cache = True


def test_auto_classes_read_the_folders_of_this_package(transformers, huggingface, model, hsi, tmp_path):
    model.save_pretrained(tmp_path / "model")
    model.hsi_encoder().save_pretrained(tmp_path / "encoder")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "mmmae"
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert config.model_config() == model.config
    assert (config.hidden_size, config.num_hidden_layers) == (64, 2)
    expected = model.hsi_encoder()(hsi)
    for folder in ("model", "encoder"):
        encoder = transformers.AutoModel.from_pretrained(tmp_path / folder, trust_remote_code=False)
        assert isinstance(encoder, huggingface.MMMAEModel)
        assert not encoder.training
        out = encoder(hsi=hsi, output_hidden_states=True)
        assert torch.equal(out.last_hidden_state, expected)
        assert [tuple(each.shape) for each in out.hidden_states] == [(2, 64, 64)] * 2
    whole = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert (whole.dtype, whole.num_parameters()) == (torch.bfloat16, model.num_parameters())
    again = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "model").train()
    assert torch.equal(again(hsi, seed=5).loss, model.train()(hsi, seed=5).loss)
    with pytest.raises(ValueError, match=r"weights of MMMAEForPreTraining are missing, .*needs AutoModel"):
        transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "encoder")


def test_this_package_reads_the_folders_of_auto_classes(transformers, huggingface, model, hsi, tmp_path):
    model.save_pretrained(tmp_path / "model")
    whole = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "model")
    whole.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["config.json", "model.safetensors"]
    back = mmmae.FastModel.from_pretrained(tmp_path / "again")
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
    whole.config.save_pretrained(tmp_path / "again")  # transformers' own writer, with its keys
    assert mmmae.HSIEncoder.from_pretrained(tmp_path / "again").config == model.config.replace(aux={})
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    (tmp_path / "again" / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(ValueError, match="model_type is 'vit', expected 'mmmae'"):
        mmmae.FastModel.from_pretrained(tmp_path / "again")


def test_a_trainer_of_an_auto_class_writes_checkpoints_that_this_package_reads(transformers, trainer, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    whole = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "model")
    run = trainer(whole, tmp_path / "run", max_steps=1, gradient_checkpointing=True)
    run.train()
    assert whole.mmmae.blocks[0].recompute
    run.save_model(tmp_path / "trained")
    back = mmmae.FastModel.from_pretrained(tmp_path / "trained")
    assert torch.equal(back.mask_token, whole.mmmae.mask_token)
    assert not torch.equal(back.mask_token, model.mask_token)
    assert torch.isfinite(torch.tensor(run.evaluate()["eval_loss"]))


def test_a_new_model_of_an_auto_class_is_initialised_as_this_packages(transformers, huggingface, model):
    config = huggingface.MMMAEPretrainedConfig(**model.config.to_dict())
    torch.manual_seed(0)
    new = transformers.AutoModelForPreTraining.from_config(config)
    for name, parameter in model.named_parameters():
        assert torch.equal(new.mmmae.get_parameter(name), parameter), name


def test_merged_adapters_of_peft_give_the_same_tokens(model, hsi):
    peft = pytest.importorskip("peft", reason="needs peft")
    encoder = model.hsi_encoder()
    plain = encoder(hsi).detach()
    config = peft.LoraConfig(r=2, target_modules=["qkv", "proj", "fc1", "fc2"], exclude_modules=["patch_embed.proj"])
    torch.manual_seed(2)
    adapted = peft.get_peft_model(encoder, config)
    torch.testing.assert_close(adapted(hsi), plain)  # an adapter is zero at first
    adapters = {name: parameter for name, parameter in adapted.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * 4 * 2
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=0.1)
    tokens = adapted(hsi)
    tokens.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapters.values())
    assert encoder.norm.weight.grad is None
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(hsi), tokens, rtol=1e-4, atol=1e-5)
    assert (tokens - plain).abs().max() > 0.1
