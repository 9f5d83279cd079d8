"""What the documentation shows can be used: settings exist, scripts and manifests parse, links lead somewhere."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from edt_diffusion.config import load_config, presets
from edt_diffusion.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DOCS = {path.name: path.read_text() for path in [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]}


def blocks(name, language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS[name], flags=re.MULTILINE | re.DOTALL)


def command_lines():
    """Every training command that stands on a line of its own, launched or not, as (page, arguments after `train`)."""
    for name, text in DOCS.items():
        whole = text.replace("\\\n", " ")
        for line in re.findall(r"^(?:    edt|[^`\n]* -m edt_diffusion) train (.+)$", whole, re.MULTILINE):
            yield name, re.sub(r"(' \|\| exit| &)$", "", line).split()


def number_after(option, text):
    return int(re.findall(rf"{option} (\d+)", text)[0])


TRAINED = sorted({(name, " ".join(arguments)) for name, arguments in command_lines()})


def test_training_commands_were_found_in_every_page_that_has_them():
    assert {name for name, _ in TRAINED} >= {
        "README.md",
        "clusters.md",
        "fine-tuning.md",
        "objectives.md",
        "training.md",
    }
    assert len(TRAINED) >= 20


@pytest.mark.parametrize(("name", "line"), TRAINED)
def test_presets_and_settings_of_training_commands_exist(name, line):
    words = line.split()
    settings = [word for word in words if re.match(r"[a-z_]+(\.[a-z_0-9]+)+=", word)]
    source = words[0] if words[0] in presets() else "digits"
    assert words[0] in presets() or words[0] == "--from", f"{name}: {words[0]} is no preset"
    if "--from" in words:
        settings.append("finetune.model=a")
    load_config(source, settings)  # raises on an unknown key or a value out of range


# `group.key=value` within the text; an ellipsis or a bare key says nothing that can be checked.
INLINE = sorted(
    {
        (name, setting)
        for name, text in DOCS.items()
        for setting in re.findall(r"`((?:train|objective|ema|validation|samples|finetune|data)\.[\w.]+=[^`\s]+)`", text)
    }
)


def test_settings_were_found_in_the_text():
    assert len(INLINE) >= 30


@pytest.mark.parametrize(("name", "setting"), INLINE)
def test_settings_named_in_the_text_exist(name, setting):
    needs = {
        "logit_mean": ["objective.name=flow"],
        "shift": ["objective.name=flow", "objective.timesteps=shifted"],
        "p2_": ["objective.loss_weighting=p2"],
        "best_mode": ["train.best_metric=fid"],
    }
    extra = [value for key, values in needs.items() if f".{key}" in setting for value in values]
    if setting.startswith("finetune."):
        extra.append("finetune.model=a")
    load_config("digits", [*extra, setting])


def test_a_setting_that_does_not_exist_is_noticed():
    with pytest.raises(UserError, match="unknown key"):
        load_config("digits", ["train.max_rollback=3"])


@pytest.mark.parametrize("name", DOCS)
def test_shell_blocks_parse(name):
    for block in blocks(name, "bash"):
        made = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, timeout=20)
        assert made.returncode == 0, made.stderr
        assert not made.stderr


def test_the_slurm_script_is_signalled_before_it_ends_and_comes_back():
    (script,) = (block for block in blocks("clusters.md", "bash") if "#SBATCH" in block)
    assert script.startswith("#!/bin/bash\n#SBATCH")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script, flags=re.MULTILINE))
    assert len(options) == script.count("#SBATCH")
    assert options["signal"] == "USR1@120"
    assert options["requeue"] == ""
    inner = re.search(r"bash -c '(.*?)'", script, flags=re.DOTALL)
    assert inner is not None
    made = subprocess.run(["bash", "-n"], input=inner.group(1), text=True, capture_output=True, timeout=20)
    assert (made.returncode, made.stderr) == (0, "")


def test_the_kubernetes_manifest_is_consistent():
    (text,) = blocks("clusters.md", "yaml")
    service, claim, job = yaml.safe_load_all(text)
    assert [part["kind"] for part in (service, claim, job)] == ["Service", "PersistentVolumeClaim", "Job"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (script,) = container["args"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=20).returncode == 0
    # The first pod is found by the service's name, at its port.
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    port = service["spec"]["ports"][0]["port"]
    assert f"--master-addr {job['metadata']['name']}-0.{pod['subdomain']} --master-port {port}" in " ".join(
        script.replace("\\\n", " ").split()
    )
    nodes = number_after("--nnodes", script)
    assert nodes == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert number_after("--nproc-per-node", script) == container["resources"]["limits"]["nvidia.com/gpu"]
    # The launcher gives up before Kubernetes does.
    assert number_after("--shutdown-timeout", script) < pod["terminationGracePeriodSeconds"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert pod["restartPolicy"] == "OnFailure"


def test_the_table_of_presets_is_that_of_the_presets():
    table = {
        name: [cell.strip() for cell in rest.split("|")]
        for name, rest in re.findall(r"^\| `([\w-]+)` \|(.*)\|$", DOCS["training.md"], flags=re.MULTILINE)
        if name in presets()
    }
    assert table.keys() == presets().keys()
    for name, (_, parameters, adds, cost, memory) in table.items():
        header = " ".join(line.lstrip("# ") for line in presets()[name].split("\nseed:")[0].splitlines())
        assert f"{parameters} parameters, {adds} multiply-adds a picture, {cost}FLOPs of training" in header, name
        for figure in re.findall(r"[\d.]+", memory.split("(")[0]):
            assert f"{figure} GiB" in header, name


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name):
    base = ROOT if name == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", DOCS[name]):
        assert (base / link).exists(), link


@pytest.mark.parametrize("name", DOCS)
def test_files_of_the_repository_that_are_named_exist(name):
    for path in re.findall(r"`((?:tests|src|benchmarks)/[\w/.-]+)`", DOCS[name]):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", sorted(DOCS))
def test_no_placeholder_is_left(name):
    assert not re.findall(r"^[A-Z]{3,}_[A-Z_]+$", DOCS[name], flags=re.MULTILINE)
