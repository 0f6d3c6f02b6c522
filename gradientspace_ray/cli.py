"""The command line: `gradientspace run | status | serve | report | route`.

Commands import what they run when they run, so that `--help` and `status` answer at once; everything else in the
package imports at the top.
"""

import contextlib
import errno
import json
import os
import sys
import threading
import traceback
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from gradientspace_ray import recipe as recipes
from gradientspace_ray.run import Manifest, RunDirectory

app = typer.Typer(
    help="Cluster instruction data by LoRA gradients, train one expert per cluster, serve the router that picks it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, soft_wrap=True)
RunDirArgument = Annotated[str, typer.Argument(help="A run directory: a local folder or an s3:// or gs:// URI.")]


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's YAML file, or a packaged one: quickstart, tiny, gpu.")],
    run_dir: Annotated[str | None, typer.Option(help="Where results go; default runs/<recipe's name>.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key, as in --set experts.epochs=2; repeatable.")
    ] = None,
    until: Annotated[str | None, typer.Option(help=f"Last stage to run: {', '.join(recipes.STAGES)}.")] = None,
) -> None:
    """Run a recipe from dataset to router. Finished stages are skipped, so the same command also resumes."""
    settings = recipes.load_recipe(recipe, assignments or [])
    if until is not None and until not in recipes.STAGES:
        raise recipes.RecipeError(f"--until {until}: no such stage; stages are {', '.join(recipes.STAGES)}")
    directory = RunDirectory(run_dir or f"runs/{settings.name}")
    from gradientspace_ray import connection, pipeline

    try:
        with connection.disconnecting():
            pipeline.run_pipeline(settings, directory, until, console)
    except KeyboardInterrupt:
        console.print("\ninterrupted; run the same command again to continue where it stopped", style="yellow")
        raise typer.Exit(130) from None
    console.print(_table(directory.manifest()))
    if "evaluate" in directory.manifest().stages and until in (None, "report"):
        shown = run_dir or f"runs/{settings.name}"
        console.print("Next:")
        console.print(f"  open {shown}/report.html")
        console.print(f"  gradientspace route {shown} 'Write a Python function that reverses a list.'")
        console.print(f"  gradientspace serve {shown} --port 8000")


@app.command()
def status(
    run_dir: RunDirArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest's stages as JSON.")] = False,
) -> None:
    """Show the stages of a run: what is done, how long it took, what it made."""
    directory = RunDirectory(run_dir)
    if not directory.exists("manifest.json"):
        raise FileNotFoundError(f"{run_dir} holds no run; start one with: gradientspace run quickstart")
    manifest = directory.manifest()
    if as_json:
        stages = {name: record.model_dump(mode="json") for name, record in manifest.stages.items()}
        sys.stdout.write(json.dumps({"run_dir": directory.uri, "stages": stages}, indent=2) + "\n")
    else:
        console.print(_table(manifest))


@app.command()
def serve(
    run_dir: RunDirArgument,
    port: Annotated[int, typer.Option(help="Port of the endpoint; 0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    ask: Annotated[
        list[str] | None,
        typer.Option(help="Send this prompt, print the routed answer, and stop; repeatable."),
    ] = None,
) -> None:
    """Serve a run's router and experts behind an OpenAI-compatible endpoint."""
    from gradientspace_ray import connection
    from gradientspace_ray.serving import app as serving

    arguments = serving.ServeArguments(run_dir=RunDirectory(run_dir).uri)
    with connection.disconnecting():
        url = serving.start(arguments, host, port)
        if ask:
            for prompt in ask:
                _show_answer(url, prompt)
            return
        console.print(f"Serving {run_dir} at {url}/v1 (model: auto). Stop with Ctrl-C. Try:")
        body = '{"model": "auto", "messages": [{"role": "user", "content": "Tell me a story about a lighthouse."}]}'
        console.print(f"  curl -i {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


@app.command()
def report(run_dir: RunDirArgument) -> None:
    """Write report.html again from what the run has made so far."""
    from gradientspace_ray.stages import report as report_stage

    directory = RunDirectory(run_dir)
    settings = recipes.load_recipe(str(directory.fetch("recipe.yaml")))
    console.print(report_stage.report(settings, directory).made)


@app.command()
def route(run_dir: RunDirArgument, prompt: Annotated[str, typer.Argument(help="What a user would ask.")]) -> None:
    """Say which expert the router picks for a prompt, without starting an endpoint."""
    from gradientspace_ray.router.classifier import Router

    decision = Router.load(RunDirectory(run_dir).fetch("router")).route([prompt])[0]
    expert = decision.expert or "generalist"
    console.print(f"[bold]{expert}[/bold]  confidence {decision.confidence:.2f}, {decision.reason}")


def _show_answer(url: str, prompt: str) -> None:
    request = {"model": "auto", "messages": [{"role": "user", "content": prompt}], "max_tokens": 96, "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=request, timeout=300)
    answer.raise_for_status()
    console.print(f"\n[bold]{prompt}[/bold]")
    for name, value in answer.headers.items():
        if name.startswith("x-gradientspace-"):
            console.print(f"[dim]{name}: {value}[/dim]")
    console.print(answer.json()["choices"][0]["message"]["content"], markup=False)


def _table(manifest: Manifest) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    table.add_column("status")
    table.add_column("seconds", justify="right")
    table.add_column("made")
    for name in recipes.STAGES:
        record = manifest.stages.get(name)
        if record is None:
            table.add_row(name, "[dim]-[/dim]", "", "")
        else:
            table.add_row(name, record.status, f"{record.seconds:.0f}", record.error or record.made)
    return table


def explain(error: Exception) -> str:
    """One line for the person who must act."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or 'no space left'}); free some space and run the same command again"
    text: Any = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def main() -> None:
    """Entry point of the `gradientspace` command: errors become one line and exit code 1."""
    try:
        app()
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        if os.environ.get("GRADIENTSPACE_DEBUG"):
            traceback.print_exc()
        Console(stderr=True, highlight=False).print(f"[red]error:[/red] {explain(error)}", soft_wrap=True, markup=True)
        raise SystemExit(1) from None
