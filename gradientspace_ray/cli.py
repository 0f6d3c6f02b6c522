"""The command line: `gradientspace run | resume | status | serve | release | report | route`.

Commands import what they run when they run, so that `--help` and `status` answer at once; everything else in the
package imports at the top.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradientspace_ray import recipe as recipes
from gradientspace_ray.errors import one_line
from gradientspace_ray.run import Manifest, RunDirectory

app = typer.Typer(
    help="Cluster instruction data by LoRA gradients, train one expert per cluster, serve the router that picks it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, soft_wrap=True)
API_KEY_ENV = "GRADIENTSPACE_API_KEY"
ANSWER_TIMEOUT_S = 300
RunDirArgument = Annotated[str, typer.Argument(help="A run directory: a local folder or an s3:// or gs:// URI.")]


class Device(str, Enum):
    """Where the experts compute."""

    CPU = "cpu"
    CUDA = "cuda"


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's YAML file, or a packaged one: quickstart, tiny, gpu.")],
    run_dir: Annotated[str | None, typer.Option(help="Where results go; default runs/<recipe's name>.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key, as in --set experts.epochs=2; repeatable.")
    ] = None,
    until: Annotated[str | None, typer.Option(help=f"Last stage to run: {', '.join(recipes.STAGES)}.")] = None,
    again: Annotated[str | None, typer.Option(help="Remove what this stage made; run it and what follows.")] = None,
) -> None:
    """Run a recipe from dataset to router. Finished stages are skipped, so the same command also resumes."""
    settings = recipes.load_recipe(recipe, assignments or [])
    _run(settings, run_dir or f"runs/{settings.name}", until, again)


@app.command()
def resume(
    run_dir: RunDirArgument,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key, as in --set experts.workers=1; repeatable.")
    ] = None,
    until: Annotated[str | None, typer.Option(help=f"Last stage to run: {', '.join(recipes.STAGES)}.")] = None,
    again: Annotated[str | None, typer.Option(help="Remove what this stage made; run it and what follows.")] = None,
) -> None:
    """Go on with a run by the recipe that it holds; what is finished is kept."""
    directory = RunDirectory(run_dir)
    directory.require()
    text = directory.read_bytes("recipe.yaml").decode()
    settings = recipes.read_recipe(text, directory.path("recipe.yaml"), assignments or [])
    _run(settings, run_dir, until, again)


def _run(settings: recipes.Recipe, run_dir: str, until: str | None, again: str | None) -> None:
    for option, stage in (("--until", until), ("--again", again)):
        if stage is not None and stage not in recipes.STAGES:
            raise recipes.RecipeError(f"{option} {stage}: no such stage; stages are {', '.join(recipes.STAGES)}")
    if until and again and recipes.STAGES.index(again) > recipes.STAGES.index(until):
        raise recipes.RecipeError(f"--again {again}: it follows --until {until}; give an earlier stage")
    directory = RunDirectory(run_dir)
    with _interruptible("run the same command again to continue where it stopped"):
        from gradientspace_ray import pipeline

        with pipeline.disconnecting():
            pipeline.run_pipeline(settings, directory, console, until, again)
    console.print(_table(directory.manifest()))
    if "evaluate" in directory.manifest().stages and until in (None, "report"):
        shown = escape(run_dir)
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
    directory.require()
    manifest = directory.manifest()
    if as_json:
        stages = {name: record.model_dump(mode="json") for name, record in manifest.stages.items()}
        sys.stdout.write(json.dumps({"run_dir": directory.uri, "stages": stages}, indent=2) + "\n")
    else:
        console.print(_table(manifest))


@app.command()
def serve(
    run_dir: RunDirArgument,
    port: Annotated[int, typer.Option(help="Port of the endpoint; 0 takes a free one.", min=0, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    device: Annotated[
        Device | None, typer.Option(help="Where the experts compute; default is what the run computed on.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Set an argument, as in --set max_slots=16; repeatable.")
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(help="Send this prompt, print the routed answer, and stop; repeatable."),
    ] = None,
) -> None:
    """Serve a run's router and experts behind an OpenAI-compatible endpoint.

    Clients need a key where GRADIENTSPACE_API_KEY is set. What --set takes is in serving/arguments.py.
    """
    directory = RunDirectory(run_dir)
    directory.require()
    with _interruptible("the endpoint has stopped"):
        # Let SIGTERM do what Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        from gradientspace_ray import pipeline
        from gradientspace_ray.serving import app as serving
        from gradientspace_ray.serving.arguments import read_arguments

        chosen = device.value if device else _device_of(directory)
        serving.check_device(chosen)
        settings = {"run_dir": directory.uri, "device": chosen, "start_attempts": 1}
        arguments = serving.own_share(read_arguments(settings, assignments or []), pipeline.local_cpus())
        serving.check_keys(arguments, host)
        with serving.reserved_port(host, port) as port, pipeline.disconnecting():
            application = serving.build(arguments)
            console.print("[dim]starting Ray, the router and the experts[/dim]")
            pipeline.connect(chosen)
            with serving.endpoint(application, host, port) as url:
                if not ask:
                    _announce(run_dir, url)
                    threading.Event().wait()
                for prompt in ask or []:
                    _show_answer(url, prompt)


@app.command()
def release(
    run_dir: Annotated[
        str | None, typer.Argument(help="The run to publish, where the endpoint can read it: a folder or a URI.")
    ] = None,
    endpoint: Annotated[str, typer.Option(help="Address of the running endpoint.")] = "http://127.0.0.1:8000",
    canary: Annotated[
        str | None, typer.Option(help="Share of the conversations that it answers for now, as in 10%; default is all.")
    ] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Let the canary answer everything.")] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Withdraw the canary, or go back to the release before.")
    ] = False,
    status: Annotated[bool, typer.Option("--status", help="Only show which releases answer.")] = False,
) -> None:
    """Bring a run's experts and router into a running endpoint, or take them back. No request is lost.

    The endpoint's admin key is read from GRADIENTSPACE_ADMIN_KEY.
    """
    from gradientspace_ray import release_client

    request = release_client.request_of(run_dir, canary, promote, rollback, status)
    console.print(release_client.table_of(release_client.ask(endpoint, *request)))


@app.command()
def report(run_dir: RunDirArgument) -> None:
    """Write report.html again from what the run has made so far."""
    directory = RunDirectory(run_dir)
    directory.require()
    from gradientspace_ray.stages import report as report_stage

    settings = recipes.load_recipe(str(directory.fetch("recipe.yaml")))
    console.print(report_stage.report(settings, directory).made, markup=False)


@app.command()
def route(run_dir: RunDirArgument, prompt: Annotated[str, typer.Argument(help="What a user would ask.")]) -> None:
    """Say which expert the router picks for a prompt, without starting an endpoint."""
    directory = RunDirectory(run_dir)
    directory.require()
    from gradientspace_ray.router.classifier import Router

    decision = Router.load(directory.fetch("router")).route([prompt])[0]
    expert = decision.expert or "generalist"
    console.print(f"[bold]{escape(expert)}[/bold]  confidence {decision.confidence:.2f}, {decision.reason}")


@contextlib.contextmanager
def _interruptible(what_now: str) -> Iterator[None]:
    """Ctrl-C ends the block with one line and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"\ninterrupted; {what_now}", style="yellow")
        raise typer.Exit(130) from None


def _device_of(directory: RunDirectory) -> str:
    return recipes.load_recipe(str(directory.fetch("recipe.yaml"))).compute.device


def _announce(run_dir: str, url: str) -> None:
    """Say where the endpoint is, and how to ask it."""
    console.print(f"Serving {escape(run_dir)} at {url}/v1 (model: auto). Stop with Ctrl-C. Open {url} or try:")
    body = '{"model": "auto", "messages": [{"role": "user", "content": "Tell me a story about a lighthouse."}]}'
    key = f' -H "Authorization: Bearer ${API_KEY_ENV}"' if os.environ.get(API_KEY_ENV) else ""
    command = f"curl -i '{url}/v1/chat/completions'{key} -H 'Content-Type: application/json' -d '{body}'"
    console.print(f"  {command}", markup=False)


def _show_answer(url: str, prompt: str) -> None:
    request = {"model": "auto", "messages": [{"role": "user", "content": prompt}], "max_tokens": 96, "temperature": 0}
    key = os.environ.get(API_KEY_ENV)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = httpx.post(f"{url}/v1/chat/completions", json=request, headers=headers, timeout=ANSWER_TIMEOUT_S)
    if answer.is_error:
        raise RuntimeError(f"the endpoint answered with status {answer.status_code}: {_error_message(answer)}")
    console.print(f"\n[bold]{escape(prompt)}[/bold]")
    for name, value in answer.headers.items():
        if name.startswith("x-gradientspace-"):
            console.print(f"[dim]{name}: {escape(value)}[/dim]")
    console.print(answer.json()["choices"][0]["message"]["content"].strip(), markup=False)


def _error_message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):  # not from this server: a proxy's page
        return answer.reason_phrase


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
            table.add_row(name, record.status, f"{record.seconds:.0f}", escape(record.error or record.made))
    return table


def explain(error: Exception) -> str:
    """One line for the person who must act."""
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno == errno.ENOSPC:
            place = link.filename or "no space left"
            return f"the disk is full ({place}); free some space and run the same command again"
    if isinstance(error, httpx.TransportError):
        return f"the endpoint does not answer ({type(error).__name__}: {error})"
    return one_line(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, also across Ray's workers, outermost first."""
    seen: set[int] = set()
    link: Any = error
    while isinstance(link, BaseException) and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = getattr(link, "cause", None) or link.__cause__


def _ray_errors() -> tuple[type[Exception], ...]:
    """Ray's own errors, without loading Ray: as long as nothing else has loaded it, there are none."""
    loaded = sys.modules.get("ray.exceptions")
    return (loaded.RayError,) if loaded else ()


def _expected_errors() -> tuple[type[Exception], ...]:
    return (ValueError, RuntimeError, OSError, KeyError, httpx.HTTPError, httpx.InvalidURL, *_ray_errors())


def main() -> None:
    """Entry point of the `gradientspace` command: errors become one line and exit code 1."""
    try:
        app()
    except _expected_errors() as error:
        if os.environ.get("GRADIENTSPACE_DEBUG"):
            traceback.print_exc()
        Console(stderr=True, highlight=False).print(f"[red]error:[/red] {escape(explain(error))}", soft_wrap=True)
        raise SystemExit(1) from None
