"""The names by which a best checkpoint can be chosen, against docs/metrics.md and refusals."""

import pytest
from metric_names import documented_metrics, is_documented

from distill_system.config.evaluation import HELD_OUT_MEASURES, EvaluationConfig
from distill_system.errors import ConfigError


def test_what_can_be_best_is_what_is_documented():
    documented = {name for name in documented_metrics() if name.startswith("held_out/")}
    assert documented == {f"held_out/{name}" for name in HELD_OUT_MEASURES}
    names = EvaluationConfig(metrics=("bleu", "accuracy")).names("test")
    assert "evaluation/test/bleu_sampled" in names
    assert "evaluation/test/mean_length_greedy" in names
    assert all(is_documented(name) for name in names)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (
            "held_out/cross_entrpy",
            "measures no 'held_out/cross_entrpy'; did you mean 'held_out/cross_",
        ),
        ("evaluation/tset/rouge_l_greedy", "did you mean 'evaluation/test/rouge_l_greedy'?"),
        ("evaluation/test/bleu_greedy", "measures no 'evaluation/test/bleu_greedy'"),
    ],
)
def test_a_best_checkpoint_by_what_nobody_measures_is_refused(configure, metric, said):
    with pytest.raises(ConfigError) as info:
        configure(f"distill.keep_best={{metric: {metric}, mode: max}}")
    assert said in str(info.value)
    configure("distill.keep_best={metric: evaluation/test/rouge_l_greedy, mode: max}")


def test_no_metric_at_all_is_refused(configure):
    with pytest.raises(ConfigError, match=r"evaluation\.metrics.*: expected "):
        configure("evaluation.metrics=[]")
