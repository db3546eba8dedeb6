"""The guide's RealNVP pipeline, before and after the guide's own diff."""

import re
from pathlib import Path

import pytest
import torch

GUIDE = (Path(__file__).parent.parent / "docs" / "guide" / "pipeline.md").read_text()
PROGRAM = re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL)[1]
DIFF = re.search(r"```diff\n(.*?)```", GUIDE, re.DOTALL)[1]


def lines(hunk, signs):
    return "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in signs)


def patched(program):
    for hunk in DIFF.split("@@\n"):
        assert program.count(lines(hunk, "- ")) == 1
        program = program.replace(lines(hunk, "- "), lines(hunk, "+ "))
    return program


def test_one_line_changes_and_its_import():
    for sign in "-+":
        imports, calls = lines(DIFF, sign).splitlines()
        assert imports.startswith("from ")
        assert calls.startswith("    return ")


@pytest.mark.parametrize(
    ("program", "name"),
    [(PROGRAM, "AffineCouplingTransform"), (patched(PROGRAM), "MongeAmpereTransform")],
    ids=["before", "after"],
)
def test_pipeline_trains_samples_saves_and_loads(program, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = {"__name__": "__main__"}
    exec(compile(program, "pipeline.md", "exec"), run)
    for flow in (run["flow"], run["again"]):
        assert type(flow._transform._transforms[-1]).__name__ == name

    train, test, again = run["train"], run["test"], run["again"]
    gaussian = torch.distributions.MultivariateNormal(train.mean(0), train.T.cov())
    with torch.no_grad():
        log_prob = again.log_prob(test)
        assert torch.equal(run["flow"].eval().log_prob(test), log_prob)
        assert log_prob.mean() > gaussian.log_prob(test).mean() + 0.3
    samples = run["samples"]
    assert samples.shape == (1_000, 3)
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(
        samples.quantile(quartiles, dim=0), train.quantile(quartiles, dim=0), rtol=0, atol=0.6
    )
