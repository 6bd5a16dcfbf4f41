from distill_system.config.data import JsonlSource
from distill_system.config.run import RunConfig
from distill_system.config.schema import ANYTHING, describe, root_slot


def test_a_path_leads_through_unions_optionals_and_names() -> None:
    splits = root_slot(RunConfig).child("data").child("evaluation")
    source = splits.child("mine")
    assert source.discriminator == "type"
    assert source.model_for("jsonl") is JsonlSource
    assert source.model_for("nothing") is None
    assert source.child("fields", "jsonl").discriminator == "format"
    assert source.child("fields", "jsonl").default_tag == "prompt_response"
    assert source.child("fields", "embedded") is ANYTHING


def test_expectations_read_as_words() -> None:
    root = root_slot(RunConfig)
    distill = root.child("distill")
    optimizer = distill.child("optimizer")
    said = {
        "steps": describe(distill.child("steps")),
        "evaluate_every": describe(distill.child("evaluate_every")),
        "type": describe(optimizer.child("type")),
        "betas": describe(optimizer.child("adam_betas")),
        "metrics": describe(root.child("evaluation").child("metrics")),
        "unknown": describe(root.child("nothing")),
    }
    assert said == {
        "steps": "a whole number > 0",
        "evaluate_every": "a whole number > 0, or 'epoch' or null",
        "type": "'adamw' or 'muon'",
        "betas": "a list of 2, each a number >= 0 and < 1",
        "metrics": (
            "a list, each item 'exact_match', 'rouge_l', 'rouge_l_stemmed', 'bleu' or 'accuracy'"
        ),
        "unknown": "a value",
    }
