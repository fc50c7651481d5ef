"""`mmmae.TrainingStep` has the results of a loop written by hand, and refuses wrong arguments."""

import contextlib
import math

import pytest
import torch

import mmmae
from mmmae_kernels.gpu.executors import execute_by
from tests.emulator.device_waits import DeviceWaits
from tests.model.test_device_waits import batch_of, build, meta  # noqa: F401

FIELDS = {"image_size": 32, "patch": (3, 8, 8), "conditioning_dropout": 0.3}


def model_and_optimizer(kernels="auto", learning_rate=1e-2, **fields):
    torch.manual_seed(0)
    model = mmmae.fast_model("tiny", kernels=kernels, attention=kernels, **{**FIELDS, **fields})
    return model, torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1, fused=True)


def batches(count, size=32):
    """Return batches of two samples; from the third on, no sample has an autofluorescence image."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        hsi = torch.randn(2, 1, 12, size, size, generator=generator)
        names = ("ir", "af", "thickness") if number < 2 else ("ir", "thickness")
        aux = {name: torch.randn(2, 1, size, size, generator=generator) for name in names}
        present = {"ir": torch.tensor([True, False])}
        valid = torch.rand(2, size, size, generator=generator) > 0.2
        made.append((hsi, aux, present, valid))
    return made


def by_hand(model, optimizer, data, *, clip=None, accumulate=1, autocast=None, seed=0, schedule=None):
    """Train in a loop as a user would write it; return loss and gradient norm of each step."""
    figures = []
    parameters = list(model.parameters())
    for first in range(0, len(data), accumulate):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if accumulate > 1 else None
        losses = []
        for number in range(first, first + accumulate):
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = model(*data[number], seed=seed + number).loss
            (loss / accumulate).backward()
            losses.append(loss.detach())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if clip is not None:
            for gradient in gradients:
                gradient.div_(((norm + 1e-6) / clip).clamp(min=1))
        optimizer.step()
        if schedule is not None:
            schedule.step()
        figures.append((sum(losses).item() / accumulate, norm.item()))
    return figures


def assert_same_state(model, optimizer, other_model, other_optimizer):
    for (name, parameter), other in zip(model.named_parameters(), other_model.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        state, other_state = optimizer.state[parameter], other_optimizer.state[other]
        assert state.keys() == other_state.keys()
        for key in state:
            assert torch.equal(state[key], other_state[key]), (name, key)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": 1.0},
        {"clip": 1e3},
        {"accumulate": 2},
        {"clip": 1.0, "accumulate": 3, "seed": 11},
        {"autocast": torch.bfloat16},
        {"clip": 1.0, "autocast": torch.bfloat16, "accumulate": 2},
    ],
    ids=str,
)
def test_steps_are_bitwise_those_of_a_loop_written_by_hand(options):
    data = batches(6)
    model, optimizer = model_and_optimizer()
    expected = by_hand(model, optimizer, data, **options)
    other, other_optimizer = model_and_optimizer()
    step = mmmae.TrainingStep(other, other_optimizer, **options)
    complete = [step(*batch) for batch in data]
    accumulate = options.get("accumulate", 1)
    assert complete == [number % accumulate == accumulate - 1 for number in range(6)]
    assert_same_state(model, optimizer, other, other_optimizer)
    read = step.read()
    assert [figures.step for figures in read] == list(range(len(expected)))
    assert all(figures.finite for figures in read)
    if accumulate == 1:
        assert [(figures.loss, figures.gradient_norm) for figures in read] == expected
    else:
        assert [figures.loss for figures in read] == pytest.approx([loss for loss, _ in expected], rel=1e-6)
    for figures in read:
        parts = figures.loss_reconstruction + model.config.contrastive_weight * figures.loss_contrastive
        assert figures.loss == pytest.approx(parts, rel=1e-2 if "autocast" in options else 1e-6)


def test_clipping_is_that_of_torch_within_its_rounding():
    data = batches(3)
    model, optimizer = model_and_optimizer()
    for number, batch in enumerate(data):
        optimizer.zero_grad()
        model(*batch, seed=number).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        optimizer.step()
    other, other_optimizer = model_and_optimizer()
    step = mmmae.TrainingStep(other, other_optimizer, clip=1e-2)
    for batch in data:
        step(*batch)
    for (name, parameter), clipped in zip(model.named_parameters(), other.parameters(), strict=True):
        # A product with a factor against a quotient: two roundings a step, which Adam's quotient of moments keeps.
        torch.testing.assert_close(parameter, clipped, rtol=1e-4, atol=1e-5, msg=name)


def test_a_schedule_of_learning_rates_is_followed():
    def schedule_of(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    data = batches(4)
    model, optimizer = model_and_optimizer()
    by_hand(model, optimizer, data, schedule=schedule_of(optimizer))
    other, other_optimizer = model_and_optimizer()
    step, schedule = mmmae.TrainingStep(other, other_optimizer), schedule_of(other_optimizer)
    for batch in data:
        step(*batch)
        schedule.step()
    assert_same_state(model, optimizer, other, other_optimizer)


def spoil(batch):
    hsi, *others = batch
    hsi = hsi.clone()
    hsi[0, 0, 0] = math.nan
    return hsi, *others


@pytest.mark.parametrize(("accumulate", "spoiled"), [(1, 1), (2, 2), (2, 3)])
def test_a_step_that_is_not_finite_is_flagged_and_leaves_weights_and_optimizer_as_they_are(accumulate, spoiled):
    data = batches(6)
    data[spoiled] = spoil(data[spoiled])
    model, optimizer = model_and_optimizer()
    by_hand(model, optimizer, data[:accumulate], accumulate=accumulate)
    other, other_optimizer = model_and_optimizer()
    step = mmmae.TrainingStep(other, other_optimizer, accumulate=accumulate)
    for batch in data:
        step(*batch)
    assert_same_state(model, optimizer, other, other_optimizer)
    read = step.read()
    assert [figures.finite for figures in read] == [True] + [False] * (len(read) - 1)
    assert math.isnan(read[1].loss)
    assert math.isfinite(read[2].loss)  # of the weights before
    step.clear()
    for batch in data[:accumulate]:
        step(*batch)
    assert step.read()[0].finite
    assert not torch.equal(model.decoder_pred.weight, other.decoder_pred.weight)


def test_a_gradient_that_is_not_finite_is_flagged_where_the_loss_is(monkeypatch):
    model, optimizer = model_and_optimizer()
    step = mmmae.TrainingStep(model, optimizer)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: torch.tensor(math.inf))
    before = model.decoder_pred.weight.detach().clone()
    step(*batches(1)[0])
    (figures,) = step.read()
    assert math.isfinite(figures.loss)
    assert not figures.finite
    assert torch.equal(model.decoder_pred.weight, before)


def test_every_call_has_a_mask_of_its_own_which_the_seed_decides(monkeypatch):
    model, optimizer = model_and_optimizer()
    seeds, forward = [], mmmae.FastModel.forward

    def watched(self, *arguments, seed):
        seeds.append(int(seed))
        return forward(self, *arguments, seed=seed)

    monkeypatch.setattr(mmmae.FastModel, "forward", watched)
    step = mmmae.TrainingStep(model, optimizer, seed=40, accumulate=2)
    for batch in batches(3):
        step(*batch)
    step.set_seed(2**63 - 1)
    step(*batches(1)[0])
    assert seeds == [40, 41, 42, 2**63 - 1]
    latent = model(*batches(1)[0], seed=2**63 - 1).latent
    assert step.latent.shape == latent.shape
    assert not step.latent.requires_grad


def test_figures_are_read_once_and_the_last_are_kept():
    model, optimizer = model_and_optimizer()
    step = mmmae.TrainingStep(model, optimizer, read_every=3)
    data = batches(6)
    assert step.read() == []
    for batch in data[:2]:
        step(*batch)
    assert [figures.step for figures in step.read()] == [0, 1]
    assert step.read() == []
    for batch in data[2:]:
        step(*batch)
    assert [figures.step for figures in step.read()] == [3, 4, 5]


class Launches:
    """Accepts every launch and records it: kernel, programs, constants, and shapes and types of its arguments."""

    target = "sm90"

    def __init__(self):
        self.seen = []

    def __call__(self, launch):
        config = launch.configs[0]
        arguments = {
            name: (value.shape, value.dtype) if isinstance(value, torch.Tensor) else value
            for name, value in launch.arguments.items()
        }
        self.seen.append((launch.kernel.fn.__name__, launch.grid(config.constants), dict(config.constants), arguments))
        return config


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.usefixtures("meta")
def test_two_steps_launch_the_same_kernels_in_the_same_order(accumulate):
    model = build({"conditioning_dropout": 0.3, "decode_fraction": 0.5})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = mmmae.TrainingStep(model, optimizer, clip=1.0, accumulate=accumulate)
    steps = []
    for _ in range(3):
        launches = Launches()
        with execute_by(launches), DeviceWaits():  # under which meta tensors have a fused optimizer
            for _ in range(accumulate):
                step(*batch_of(model.config, valid=True))
        steps.append(launches.seen)
    assert len(steps[0]) > 20 * accumulate
    assert steps[0] == steps[1] == steps[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate is 0, expected a whole number >= 1"),
        ({"read_every": 0}, "read_every is 0, expected a whole number >= 1"),
        ({"clip": 0.0}, "clip is 0.0, expected a number > 0, or None"),
        ({"clip": math.inf}, "clip is inf, expected a number > 0, or None"),
        ({"autocast": torch.float16}, "autocast is torch.float16, which needs a loss scaler, expected torch.bfloat16"),
        ({"autocast": torch.float64}, "autocast is torch.float64, expected torch.bfloat16 or None"),
        ({"seed": -1}, r"seed is -1, expected 0..2\^63-1"),
        ({"cuda_graph": "yes"}, "cuda_graph is 'yes', must be one of auto, on, off"),
        ({"cuda_graph": "on"}, "cuda_graph is 'on', but the model is on the device cpu, and CUDA graphs need a GPU; "),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        mmmae.TrainingStep(*model_and_optimizer(), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda parameters: torch.optim.SGD(parameters), r"optimizer is SGD, which takes .*AdamW\(..., fused=True\)"),
        (lambda parameters: torch.optim.AdamW(parameters), "optimizer is AdamW without fused=True, which takes"),
    ],
    ids=["sgd", "not fused"],
)
def test_an_optimizer_that_takes_no_flag_from_the_device_is_refused(make, message):
    model, _ = model_and_optimizer()
    with pytest.raises(ValueError, match=message):
        mmmae.TrainingStep(model, make(model.parameters()))
