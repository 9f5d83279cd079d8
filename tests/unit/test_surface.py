"""The names that other programs use, reached as they would reach them."""

import subprocess
import sys

import edt_diffusion


def test_the_stable_surface_is_reached_from_a_bare_import():
    names = (
        "EDTTransformer2DModel", "DiT2DModel", "MDT2DModel", "ClassConditionalPipeline", "MaskPlan", "TokenMasks",
        "convert.from_official",
        "convert.to_official", "objectives.LearnedVarianceObjective", "models.masking.TokenMasks",
    )  # fmt: skip
    code = "import edt_diffusion; " + "; ".join(f"edt_diffusion.{name}" for name in names)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_every_exported_name_exists():
    assert set(edt_diffusion._EXPORTS) | {"__version__"} == set(edt_diffusion.__all__)
    assert all(getattr(edt_diffusion, name) is not None for name in edt_diffusion.__all__)


def test_importing_the_package_does_not_import_torch():
    code = "import sys, edt_diffusion.cli; print(int('torch' in sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "0"
