"""`edt amm search`, from what a user names to an answer. Read it from top to bottom to see what is done when."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...assemble.editing import open_model
from ...assemble.facts import picture_shape
from ...assemble.run_pictures import RunPictures, reference_input
from ...evaluation.digests import digest_of
from ...evaluation.extractors import Extractor, open_extractor
from ...evaluation.metrics import METRICS
from ...evaluation.reference import Known, features_of
from ...evaluation.result import environment
from ...nn.modulation import AttentionModulation
from ...sampling.settings import parse_setting
from ...sampling.stopping import stoppable
from ...util.errors import UserError
from ...util.files import atomic_write_json, make_folder
from ...util.lock import Lock
from ...util.lookup import lookup
from ...util.progress import CountProgress
from .candidates import Distinct, config_of, parse_blocks, parse_formulas, parse_radii, single_blocks, usable_blocks
from .features import SampledFeatures, Use
from .halving import Plan, run
from .judging import choose_metric, confirm, loss
from .landscape import draw_landscape, landscape
from .question import ANSWER, begin, compared, default_folder, read_answer, settings_of
from .report import course_facts, write_report
from .saving import save_setting


@dataclass
class Request:
    """What `edt amm search` was asked for.

    Attributes:
        model: run folder, diffusers folder or hub name.
        reference: real pictures or their statistics; None takes the pictures that the run was trained on.
        extractor: as `open_extractor` takes it.
        metric: a name of `METRICS` with a lower or higher is better; None is the Fréchet distance, or KID where the
            first rung has fewer than three pictures for each feature.
        sampling: fields of `SamplingSetting` but for the modulation.
        blocks, radii, formulas: what single blocks are tried with, in words; None of blocks is all.
        plan: how the search proceeds.
        budget: pictures that the search may make at most; None is as many as the plan takes.
        confirm: fresh pictures of each setting that is confirmed.
        least_gain: share of off's value by which a setting must be better to win.
        seed: of the pictures.
        batch: pictures made at once; None chooses.
        out: folder; None makes one beside the model.
        apply: whether to write the answer into the model's folder.
        device: None is the GPU if there is one.
        quiet: no progress.
    """

    model: str
    reference: str | None = None
    extractor: str = "inception"
    metric: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    blocks: str | None = None
    radii: str = "0.5R,0.75R,1R"
    formulas: str = "exp,cos"
    plan: Plan = field(default_factory=Plan)
    budget: int | None = None
    confirm: int = 5000
    least_gain: float = 0.01
    seed: int = 0
    batch: int | None = None
    out: Path | None = None
    apply: bool = True
    device: str | None = None
    quiet: bool = True


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        facts: everything, as in `amm.json`.
        out: the folder.
        written: the files written.
        told: what was done with the model's folder, in one line.
    """

    facts: dict[str, Any]
    out: Path
    written: list[Path]
    told: str


@dataclass
class _Counted:
    """What `stoppable` asks of a job, to say how far it has come."""

    folder: Path
    features: SampledFeatures
    plan: range

    @property
    def writer(self) -> "_Counted":
        return self

    def waiting(self) -> int:
        return len(self.plan) - self.features.pictures()


def search(request: Request) -> Outcome:
    """Find the placement of attention modulation that brings samples nearest to the reference, or that off is best.

    Raises:
        UserError: for anything the user can put right.
        Stopped: a signal came; what was made is kept.
    """
    precision = request.sampling.get("precision", "fp32")
    formulas, radii = parse_formulas(request.formulas), parse_radii(request.radii)
    _check(request)
    pipeline, facts = open_model(request.model, request.device, precision, quiet=True)
    pipeline.set_progress_bar_config(disable=True)
    network = pipeline.transformer
    saved = network.attention_modulation
    network.set_attention_modulation(None)
    classes = network.config.num_classes
    setting = parse_setting({"guidance": 1.0 if classes is None else 1.5, **request.sampling, "amm": "saved"})
    blocks = usable_blocks(
        network, None if request.blocks is None else parse_blocks(request.blocks, len(network.attention_layers()))
    )
    extractor = open_extractor(request.extractor, pipeline.device)
    known = _reference(request, pipeline, extractor)
    batch = request.batch or min(50 if pipeline.vae is None else 10, request.plan.first)
    asked: dict[str, Any] = {
        "model": {
            **{name: facts["model"][name] for name in ("from", "transformer_sha256", "vae_sha256")},
            "settings_sha256": digest_of([settings_of(part) for part in (pipeline, *pipeline.components.values())]),
        },
        "sampling": setting.model_dump(exclude={"amm"}),
        "reference": {**known.facts, "sha256": known.sha256},
        "extractor": extractor.identity(),
        "metric": request.metric,
        "candidates": {"blocks": blocks, "radii": radii, "formulas": formulas},
        "plan": asdict(request.plan),
        "budget": request.budget,
        "confirm": request.confirm,
        "least_gain": request.least_gain,
        "batch": batch,
        "seed": request.seed,
    }
    asked = json.loads(json.dumps(asked))
    out = request.out or default_folder(request.model) / digest_of(compared(asked))[:8]
    make_folder(out)
    with Lock(out, f"another process searches in {out}: wait for it, or choose another --out"):
        saved = begin(out, asked, saved, str(pipeline.device))
        pool = _pool(network, setting.guidance, blocks, radii, formulas, saved)
        plan = _plan(request, len(pool), batch)
        metric, notes = choose_metric(request.metric, known, extractor, plan.first)
        fresh = -(-request.confirm // batch) * batch
        most = plan.most_pictures(len(pool)) + 3 * fresh
        answer = read_answer(out)
        if answer is None:
            limits: dict[Use, int] = {"search": plan.sizes(len(pool))[-1], "confirm": fresh}
            with CountProgress("searching", "pictures", request.quiet) as progress:
                made = SampledFeatures(
                    out, pipeline, setting, extractor, request.seed, batch, limits,
                    told=lambda done: progress(done, most),
                )  # fmt: skip
                asked["sampling"] = made.facts()
                job: Any = _Counted(out, made, range(most))
                with stoppable(job):
                    course = run(pool, lambda each, count: loss(metric, made(each, count), known.features), plan)
                    published = network.published_modulation(setting.guidance)
                    found = confirm(course.best, published, made, known.features, metric, fresh, request.least_gain)
            answer = {
                "what": "edt amm search",
                **{name: value for name, value in asked.items() if name not in ("candidates", "plan", "budget")},
                "saved": config_of(saved),
                "metric": {
                    "name": metric.name, "title": metric.title(extractor.name),
                    "lower_is_better": metric.lower_is_better,
                },
                "notes": [*notes, *known.notes],
                "candidates": {"tried": len(pool), "blocks": blocks, "radii": radii, "formulas": formulas},
                "plan": {**asdict(plan), "pictures": plan.sizes(len(pool))},
                **found,
                "course": course_facts(course, metric.lower_is_better),
                "landscape": landscape(course, blocks, radii, formulas, Distinct(network), metric.lower_is_better),
                "cost": {use: asdict(cost) for use, cost in made.costs.items()},
                "environment": environment(str(pipeline.device)),
            }  # fmt: skip
            atomic_write_json(out / ANSWER, answer)
        written = [out / ANSWER, write_report(answer, out / "amm.md"), *draw_landscape(answer, out / "amm.png")]
        told = save_setting(request.model, answer, request.apply)
    return Outcome(answer, out, written, told)


def _check(request: Request) -> None:
    plan = request.plan
    if request.metric is not None:
        lookup(METRICS, request.metric, "metric")
    for name, value, least in (
        ("--images", plan.first, 2), ("--max-blocks", plan.max_blocks, 1), ("Plan.growth", plan.growth, 2),
        ("Plan.keep", plan.keep, 2), ("Plan.finalists", plan.finalists, 1), ("Plan.partners", plan.partners, 1),
        ("--confirm", request.confirm, 20), ("--batch-size", request.batch or 1, 1),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"{name} {value}: expected at least {least}")
    if not 0 <= request.least_gain < 1:
        raise UserError(f"--least-gain {request.least_gain}: expected a share from 0 to 1, such as 0.01")


def _reference(request: Request, pipeline: Any, extractor: Extractor) -> Known:
    run_pictures = RunPictures.of(request.model) if request.reference is None else None
    side = reference_input(request.reference, run_pictures, picture_shape(pipeline))
    if side is None:
        raise UserError("nothing to compare samples with: name real pictures or their statistics by --reference")
    return features_of(side, extractor, quiet=request.quiet)


def _pool(
    network: Any,
    guidance: float,
    blocks: Sequence[int],
    radii: Sequence[float | str | None],
    formulas: Sequence[str],
    saved: AttentionModulation | None,
) -> list[AttentionModulation]:
    """The candidates of the first round: single blocks, and what is published, suggested and saved."""
    known = (network.published_modulation(guidance), network.suggested_modulation(guidance), saved)
    others = [setting for setting in known if setting is not None]
    return Distinct(network).of([*single_blocks(blocks, radii, formulas), *others])


def _plan(request: Request, candidates: int, batch: int) -> Plan:
    plan = replace(request.plan, first=-(-request.plan.first // batch) * batch)
    return plan if request.budget is None else plan.within(request.budget, candidates, batch)
