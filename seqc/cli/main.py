"""The ``seqc`` command: its group, and how errors become one line and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import click

import seqc
from seqc.cli import bundle as bundle_command
from seqc.cli import compile as compile_command
from seqc.cli import generate as generate_command
from seqc.cli import inspect as inspect_command
from seqc.cli import passes as passes_command
from seqc.cli import run as run_command
from seqc.cli import targets as targets_command
from seqc.cli import triton as triton_command
from seqc.cli import verify as verify_command
from seqc.cli.console import State, print_json
from seqc.errors import SeqcError

_INTERRUPTED = 130
_INTERNAL = 3


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(seqc.__version__, prog_name="seqc")
@click.option("--debug", is_flag=True, help="Show a traceback with errors.")
@click.pass_obj
def cli(state: State, debug: bool) -> None:
    """Compile PyTorch sequence models, loops included, to checked dynamic-length ONNX models, and run them.

    Exit codes: 0 fine, 1 verification failed, 2 wrong usage or unreadable input, 3 unsupported model.
    """
    state.debug = state.debug or debug


for command in (
    compile_command.command,
    run_command.command,
    generate_command.command,
    inspect_command.command,
    verify_command.command,
    bundle_command.command,
    triton_command.command,
    targets_command.command,
    passes_command.command,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on ``arguments`` (default: those of the process) and return the exit code."""
    state = State()
    try:
        result = cli.main(args=arguments, prog_name="seqc", standalone_mode=False, obj=state)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        where = f" (see {error.ctx.command_path} --help)" if isinstance(error, click.UsageError) and error.ctx else ""
        return _fail(state, "UsageError", f"{error.format_message()}{where}", error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail(state, "Interrupted", "interrupted", _INTERRUPTED)
    except SeqcError as error:
        return _fail(state, type(error).__name__, str(error), error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        text = str(error).strip()
        reason = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
        hint = "" if state.debug else " (--debug shows where)"
        return _fail(state, "InternalError", f"internal error: {reason}{hint}", _INTERNAL)


def _fail(state: State, kind: str, message: str, code: int) -> int:
    if state.debug:
        traceback.print_exc()
    first, *detail = message.splitlines() or [""]
    click.echo(f"error: {first}", err=True)
    for line in detail:
        click.echo(f"  {line}", err=True)
    if state.json:
        print_json({"error": {"type": kind, "message": message}, "exit_code": code})
    return code


if __name__ == "__main__":
    main()
