"""Steps of `mmmae.TrainingStep` that are recorded and replayed have the results of those that are not."""

import pytest
import torch

import mmmae
from mmmae.training import step as training_step
from mmmae.training.graph import WARM_UPS, graph_refuses
from tests.emulator.graph import emulate
from tests.training.test_training_step import assert_same_state, batches, model_and_optimizer, spoil


@pytest.fixture
def graphs(monkeypatch):
    """Record and replay steps on the CPU as on a GPU; return the log of calls to `torch.cuda`."""
    monkeypatch.setattr(training_step, "graph_refuses", lambda device: None)
    return emulate(monkeypatch)


def step_of(model, optimizer, **options):
    """Return a step whose optimizer reads learning rates from memory, as on a GPU."""
    step = mmmae.TrainingStep(model, optimizer, **options)
    step._rates = [torch.zeros(()) for _ in optimizer.param_groups]
    return step


def train(step, data, schedule):
    for batch in data:
        if step(*batch):
            schedule.step()
    return step.read()


@pytest.mark.parametrize(
    "options",
    [{}, {"clip": 1.0}, {"clip": 1.0, "accumulate": 3}, {"autocast": torch.bfloat16, "accumulate": 2, "clip": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("spoiled", [None, 15], ids=["finite", "not finite"])
def test_replayed_steps_are_bitwise_those_without_a_graph(graphs, options, spoiled):
    data = batches(18)
    if spoiled is not None:
        data[spoiled] = spoil(data[spoiled])
    results = []
    for cuda_graph in ("off", "on"):
        model, optimizer = model_and_optimizer("eager")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 1 / (number + 1))
        step = step_of(model, optimizer, cuda_graph=cuda_graph, seed=5, **options)
        results.append((model, optimizer, train(step, data, schedule)))
    (model, optimizer, figures), (other, other_optimizer, others) = results
    assert graphs.count("replay") > 6
    assert str(figures) == str(others)  # as text, where NaN is NaN
    assert_same_state(model, optimizer, other, other_optimizer)


def test_a_call_is_warmed_up_on_a_side_stream_then_recorded_once_and_replayed(graphs):
    model, optimizer = model_and_optimizer("eager")
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    step = step_of(model, optimizer, cuda_graph="on")
    batch = batches(1)[0]
    for _ in range(WARM_UPS + 3):
        step(*batch)
    warm_up = ["side waits for current", "on side", "off side", "current waits for side"]
    recorded = "record into the pool on side, thread_local"
    assert graphs == warm_up * WARM_UPS + [recorded, "replay", "replay", "replay"]
    assert len(forwards) == WARM_UPS + 1
    assert step.graph_refused is None


def test_batches_of_other_shapes_are_recorded_each_up_to_a_number(graphs):
    model, optimizer = model_and_optimizer("eager")
    step = step_of(model, optimizer, cuda_graph="on")
    sizes = range(32, 32 + training_step.SHAPES + 2)
    for size in sizes:
        for _ in range(WARM_UPS + 1):
            step(*batches(1, size)[0])
    assert graphs.count("replay") == training_step.SHAPES
    step(*batches(1, sizes[0])[0])
    assert graphs.count("replay") == training_step.SHAPES + 1
    assert len(step.read()) == len(sizes) * (WARM_UPS + 1) + 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_go_on_without_a_graph_where_one_can_not_be_recorded(graphs, monkeypatch, accumulate):
    data = batches(20)

    def run(cuda_graph):
        model, optimizer = model_and_optimizer("eager")
        step = step_of(model, optimizer, cuda_graph=cuda_graph, accumulate=accumulate)
        for batch in data:
            step(*batch)
        return model, optimizer, step

    forward = mmmae.FastModel.forward

    def asking(self, *arguments, seed):
        output = forward(self, *arguments, seed=seed)
        output.loss.item()
        return output

    model, optimizer, _ = run("off")
    monkeypatch.setattr(mmmae.FastModel, "forward", asking)
    reason = "a step could not be recorded: CUDA error: operation not permitted when stream is capturing"
    with pytest.warns(UserWarning, match=f"training continues without a CUDA graph: {reason}"):
        other, other_optimizer, step = run("auto")
    assert step.graph_refused == reason
    assert "back to current" in graphs
    assert_same_state(model, optimizer, other, other_optimizer)
    with pytest.raises(RuntimeError, match="cuda_graph is 'on', but the step can't be recorded: CUDA error"):
        run("on")


def test_a_loaded_optimizer_state_is_recorded_anew(graphs):
    data = batches(12)
    results = []
    for cuda_graph in ("off", "on"):
        model, optimizer = model_and_optimizer("eager")
        step = step_of(model, optimizer, cuda_graph=cuda_graph)
        for batch in data[:6]:
            step(*batch)
        optimizer.load_state_dict(optimizer.state_dict())
        for batch in data[6:]:
            step(*batch)
        results += [model, optimizer]
    assert sum("record" in entry for entry in graphs) == 2
    assert_same_state(*results)


def test_what_keeps_a_step_from_being_recorded_is_told(monkeypatch):
    model, optimizer = model_and_optimizer()
    assert "CUDA graphs need a GPU" in mmmae.TrainingStep(model, optimizer).graph_refused
    assert graph_refuses(torch.device("cuda")) is None
    monkeypatch.setenv("MMMAE_DEBUG", "1")
    assert graph_refuses(torch.device("cuda")) == "MMMAE_DEBUG=1 looks at values in every step"
