"""The commands."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from labkit.errors import SpecError

app = typer.Typer(
    name="labkit",
    help="Real virtual machines for learning virtualization.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
images = typer.Typer(help="The images that VMs boot.", no_args_is_help=True)
app.add_typer(images, name="images")

#: Seconds for which `labkit run` waits for a pipe's first byte.
_STDIN_PATIENCE = 0.1

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
MachineName = Annotated[str, typer.Argument(metavar="[LAB/]NAME", help="The machine, as labkit ls shows it.")]


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, indent=2))


def print_table(headers: list[str], rows: list[list[str]], *, empty: str) -> None:
    """A table on stdout, plain where it is no terminal."""
    if not rows:
        print(empty, file=sys.stderr)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*headers, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, soft_wrap=not sys.stdout.isatty()).print(table)


@app.command()
def doctor(
    as_json: Json = False,
    refresh: Annotated[bool, typer.Option(help="Probe the accelerators anew.")] = False,
) -> None:
    """Say what this computer can do, and how to mend what it can't."""
    from labkit.checkup import doctor as examine

    report = examine(refresh=refresh)
    print_json(report.as_dict()) if as_json else print(report)


@app.command()
def demo(as_json: Json = False) -> None:
    """Make a VM, break it, bring it back, clone it: each step seen from inside the guest."""
    from labkit.demo import run_demo

    steps = run_demo(lambda step: None if as_json else print(step))
    ok = all(step.ok for step in steps)
    if as_json:
        print_json({"ok": ok, "steps": [step.as_dict() for step in steps]})
    raise typer.Exit(0 if ok else 1)


@app.command()
def ls(as_json: Json = False) -> None:
    """List all that labkit made and that is still there."""
    from labkit.lab import inventory

    things = inventory()
    if as_json:
        print_json(things)
        return
    print_table(
        ["LAB", "KIND", "NAME", "STATE"],
        [[thing["lab"], thing["kind"], thing["name"], thing["state"]] for thing in things],
        empty="Nothing is there.",
    )


@app.command()
def clean(
    labs: Annotated[
        list[str] | None, typer.Argument(help="The labs to remove; all where none is named.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also labs that a living program or notebook uses.")
    ] = False,
) -> None:
    """Remove labs with all that is in them; only what labkit made is ever touched."""
    from labkit.lab import clean as remove_labs

    outcome = remove_labs(labs or None, in_use=everything)
    for name in outcome.removed:
        print(f"removed {name}")
    for name, owner in outcome.kept.items():
        print(f"kept {name}: in use by {owner} (labkit clean --all removes it)", file=sys.stderr)
    if labs and outcome.kept:
        raise typer.Exit(1)


@app.command()
def uri() -> None:
    """Print the libvirt URI of labkit's own daemon: virsh -c "$(labkit uri)" list --all."""
    from labkit.hypervisors import daemon

    print(daemon.uri())


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    machine: MachineName,
    command: Annotated[
        list[str], typer.Argument(help="One word goes to the guest's shell, more run as they are.")
    ],
    timeout: Annotated[float, typer.Option(help="Seconds until it is killed.")] = 60,
    stdin: Annotated[
        bool,
        typer.Option("--stdin", "-i", help="Wait for all of standard input, and give it to the command."),
    ] = False,
) -> None:
    """Run a command on a machine; its output and its exit become this command's.

    A file or a pipe that stands ready on standard input is given to it; --stdin waits for a slow one.
    """
    from labkit.machines.machine import echo_bytes

    given = sys.stdin.buffer.read() if sys.stdin and (stdin or _stands_ready(sys.stdin.fileno())) else None
    done = _machine(machine).run(
        command[0] if len(command) == 1 else command,
        input=given,
        timeout=timeout,
        check=False,
        on_output=echo_bytes,
    )
    raise typer.Exit(done.returncode)


@app.command()
def console(machine: MachineName) -> None:
    """Type at a VM's serial console; Ctrl-] leaves."""
    from labkit.cli.console import attach

    attach(_machine(machine))


@app.command()
def screenshot(
    machine: MachineName,
    to: Annotated[Path | None, typer.Option(help="The PNG to write; NAME.png by default.")] = None,
) -> None:
    """Keep what a VM's screen shows as a PNG."""
    vm = _machine(machine)
    print(vm.screenshot().save(to or Path(f"{vm.name}.png")))


@images.command("list")
def images_list(as_json: Json = False) -> None:
    """List the images that VMs can boot."""
    from labkit import guests

    rows = guests.describe()
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
        return
    print_table(
        ["IMAGE", "HERE", "WHAT IT IS"],
        [[row.name, "yes" if row.cached else "no", row.what] for row in rows],
        empty="There are none.",
    )


@images.command("build")
def images_build(
    name: Annotated[str, typer.Argument(help="The image, as labkit images list shows it.")],
) -> None:
    """Build or fetch an image, or bring it up to date."""
    from labkit import guests

    image = guests.get(name, refresh=True)
    print(f"{image.name}: {image.version}")


def _stands_ready(descriptor: int) -> bool:
    """Whether there is something to be read, or an end; a script's or a service's own standard input may
    stay open and silent for ever, and is no input then."""
    if os.isatty(descriptor):
        return False
    return bool(select.select([descriptor], [], [], _STDIN_PATIENCE)[0])


def _machine(name: str) -> Any:
    """The machine of a name, or of LAB/NAME where several labs have one of that name."""
    from labkit import state
    from labkit.errors import NotFound
    from labkit.lab import Lab

    lab, _, short = name.rpartition("/")
    if lab:
        return Lab.attach(lab)[short]
    homes = [
        there
        for there in state.lab_names()
        if any(entry.name == short for entry in state.lab(there).entries("vm"))
    ]
    if not homes:
        raise NotFound(f"There is no machine named {short}.", mend="labkit ls shows those that there are.")
    if len(homes) > 1:
        choices = ", ".join(f"{there}/{short}" for there in homes)
        raise SpecError(f"Several labs have a machine named {short}.", mend=f"Say which: {choices}")
    return Lab.attach(homes[0])[short]
