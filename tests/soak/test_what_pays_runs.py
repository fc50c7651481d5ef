"""The experiment on pretraining runs with each of its settings."""

from tests.training.test_what_pays import experiment, run_quickly  # noqa: F401  fixtures


def test_a_quick_run_measures_each_method_once(experiment, run_quickly):  # noqa: F811
    for _ in range(2):
        results = run_quickly()
    assert [result["method"] for result in results] == list(experiment.METHODS)
    steps = {result["method"]: result["steps"] for result in results}
    assert {method for method, count in steps.items() if count == 0} == {*experiment.SPECTRA, experiment.RANDOM}
