"""`model view`: writes a page of a container's experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.codec import to_json
from harness.cli.options import container_argument, json_option, print_json, profile_option
from harness.errors import UsageError
from reports.text import harmless

if TYPE_CHECKING:
    from engine.container import Container
    from engine.experts.profile import PathProfile
    from engine.offline.routing.trace import Trace
    from reports.charts.heat import Grid
    from reports.pages.experts import ExpertFacts

_MOST_LAYERS_OF_A_PATH = 3  # that are drawn, besides all


@click.command()
@container_argument
@profile_option
@click.option(
    "--trace", type=click.Path(path_type=Path), metavar="TRACE",
    help="See `model trace`; of a text that the profile has not seen it shows what a prediction is worth.",
)  # fmt: skip
@click.option(
    "--plan", type=click.Path(path_type=Path), metavar="PLAN",
    help="Plan of `model adapt`, for the importance of experts.  [default: FILE.plan.json, where there is one]",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), default="experts.html", show_default=True,
              help="The page to write.")  # fmt: skip
@json_option
def view(
    container: Path, profile: Path | None, trace: Path | None, plan: Path | None, output: Path, as_json: bool
) -> None:
    """Write a page of FILE's experts.

    It shows bits, importance, and how often and along which paths experts are activated. The page is one file without
    any reference outside itself. What is not given is left out.

    \b
    Examples:
      edgemoe-farm model view small.emoe -o experts.html
      edgemoe-farm model view small.emoe --profile model.profile.json --trace held-out.trace -o experts.html
    """
    from engine.container import Container
    from engine.experts.profile import PathProfile
    from engine.offline.routing.trace import Trace
    from reports.pages.experts import render

    facts = _facts(
        container,
        Container.open(str(container)),
        None if profile is None else PathProfile.load(str(profile)),
        None if trace is None else Trace.load(str(trace)),
        _plan_beside(container) if plan is None else plan,
    )
    page = render(facts, output)
    if as_json:
        print_json({"page": str(page), **to_json(facts)})
    else:
        click.echo(f"experts of {harmless(container.name)}: {page}")


def _plan_beside(container: Path) -> Path | None:
    plan = container.with_name(container.name + ".plan.json")
    return plan if plan.is_file() else None


def _facts(
    path: Path, container: Container, profile: PathProfile | None, trace: Trace | None, plan: Path | None
) -> ExpertFacts:
    from engine.models import model_config
    from engine.offline.accuracy.adapt import read_evidence
    from engine.offline.routing import activation_paths
    from reports.pages.experts import ExpertFacts

    layers, experts, top_k = container.moe_layers, container.experts_per_layer, model_config(container).top_k
    for name, found in (("profile", profile), ("trace", trace)):
        if found is not None and (found.layers, found.experts) != (layers, experts):
            raise UsageError(
                f"the {name} is of a model with {found.layers} layers of {found.experts} experts, and {path} has "
                f"{layers} of {experts}: make it again with `edgemoe-farm model {name}`"
            )
    evidence = None if plan is None else read_evidence(plan)
    importance = {} if evidence is None else evidence.importance
    if any(not (0 <= layer < layers and 0 <= expert < experts) for layer, expert in importance):
        raise UsageError(f"{plan}: the plan is of another model than {path}: name its own with --plan")
    counted = profile or (None if trace is None else activation_paths.selftest_profile(trace))
    source = "in the profiled text" if profile is not None else "in the traced text"
    return ExpertFacts(
        name=path.name,
        facts=_summary(path, container, counted, trace, None if evidence is None else evidence.loss),
        formats=tuple(
            tuple(container.formats[container.primary[layer, expert].format].label for expert in range(experts))
            for layer in range(layers)
        ),
        top_k=top_k,
        frequency=_grid({} if counted is None else _shares(counted), layers, experts),
        frequency_source="" if counted is None else f"{source} of {counted.tokens:,} tokens",
        importance=_grid(importance, layers, experts),
        importance_meaning="" if evidence is None else evidence.meaning,
        coverage=(
            None
            if counted is None
            else dict(
                zip(activation_paths.KNOWN, activation_paths.coverage(counted, trace if profile else None), strict=True)
            )
        ),
        coverage_source=(
            "in the traced text, as the profile ranks them"
            if profile is not None and trace is not None
            else "in the very text that was counted, which flatters the longer paths"
        ),
        paths=None if trace is None else {n: activation_paths.path_counts(trace, n) for n in _lengths(trace)},
    )


def _lengths(trace: Trace) -> list[int]:
    most = int(trace.chosen.shape[1])
    return [*range(1, min(_MOST_LAYERS_OF_A_PATH, most - 1) + 1), most]


def _shares(profile: PathProfile) -> dict[tuple[int, int], float]:
    """Returns the share of every expert in the layers that were counted, also of those never activated."""
    counted = [layer for layer, counts in enumerate(profile.marginal) if counts]
    return {**{(layer, e): 0.0 for layer in counted for e in range(profile.experts)}, **profile.frequency()}


def _grid(values: dict[tuple[int, int], float], layers: int, experts: int) -> Grid:
    if not values:
        return ()
    return tuple(tuple(values.get((layer, expert)) for expert in range(experts)) for layer in range(layers))


def _summary(
    path: Path, container: Container, profile: PathProfile | None, trace: Trace | None, loss: str | None
) -> tuple[tuple[str, str], ...]:
    from engine.offline.summary import container_summary

    known = container_summary(str(path))
    rows = [
        ("architecture", str(known["architecture"])),
        ("MoE layers", f"{known['moe_layers']} of {known['layers']} layers"),
        ("experts in a layer", f"{known['experts_per_layer']}, of which a token activates {known['top_k']}"),
        ("bytes of experts", f"{known['bytes_experts']:,}"),
        ("bytes of the rest", f"{known['bytes_non_experts']:,}"),
        ("records", ", ".join(f"{n} in {label}" for label, n in known["formats"].items())),
    ]
    if loss is not None:
        rows.append(("loss of the plan", loss))
    if profile is not None:
        rows.append(("tokens counted", f"{profile.tokens:,}"))
    if trace is not None:
        rows.append(("tokens traced", f"{len(trace.tokens):,}"))
    return (*rows, *((str(key), str(value)) for key, value in known["origin"].items()))
