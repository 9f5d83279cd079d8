"""DiT and MDTv2 as a user meets them: files of their authors converted, described and profiled."""

import json

import pytest
import torch

from edt_diffusion import ClassConditionalPipeline
from edt_diffusion.convert import to_official
from edt_diffusion.models import BACKBONES

OWN = {"DiT": {"depth": 2}, "MDTv2": {"depth": 4, "decode_layers": 2}}


@pytest.mark.parametrize("family", OWN)
def test_a_file_of_the_authors(edt, tmp_path, family):
    torch.manual_seed(0)
    ends = {"sample_size": 8, "patch_size": 1, "in_channels": 1, "num_classes": 3}
    model = BACKBONES[family](**ends, hidden_size=16, num_heads=2, **OWN[family])
    file, folder = tmp_path / "official.pt", tmp_path / "converted"
    torch.save(to_official(model), file)
    said = edt("convert", file, folder)
    assert (said.code, said.out) == (2, [])
    assert said.err[0].endswith(f"not an EDT checkpoint but one of {family}: give family {family.lower()}")
    options: list[object] = ["--family", family.lower()]
    if family == "DiT":  # heads are in no tensor
        said = edt("convert", file, folder, *options)
        assert (said.code, "give num_heads" in said.err[0]) == (2, True)
        options += ["--heads", 2]
    assert edt("convert", file, folder, *options).code == 0
    back = ClassConditionalPipeline.from_pretrained(folder).transformer
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
    facts = json.loads(edt("info", folder, "--json").out[-1])
    assert facts["num_classes"] == 3
    assert facts["multiply_adds"] == sum(model.multiply_adds().values())
    few = ["--steps", 2, "--batch-size", 1, "--repeats", 1, "--guidance", 1, "--threads", 1]
    said = edt("profile", folder, *few, "--out", tmp_path / "profile")
    table = "\n".join(said.out)
    assert said.code == 0
    assert "attention" in table
    assert ("long skip" in table) == (family == "MDTv2")


@pytest.mark.parametrize(
    ("name", "parameters", "stages"), [("DiT-S/2", 32_963_360, 1), ("DiT-XL/8", None, 1), ("mdtv2-b/2", None, 3)]
)
def test_published_sizes(edt, name, parameters, stages):
    facts = json.loads(edt("info", name, "--json").out[-1])
    assert len(facts["stages"]) == stages
    assert facts["patch_size"] == int(name[-1])
    if parameters is not None:
        assert facts["parameters"]["total"] == parameters
