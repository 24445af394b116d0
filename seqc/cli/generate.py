"""``seqc generate``: write on from prompts. Needs numpy and onnxruntime, not torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import click

from seqc.cli.console import State, common_options, note, print_json
from seqc.cli.providers import provider_option
from seqc.cli.tokens import Tokenizer, tokenizer
from seqc.errors import UsageError
from seqc.runtime.inputs import Array
from seqc.runtime.ort import Provider


@click.command("generate")
@click.argument("directory", metavar="DIR")
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="Go on from this; repeat for several.")
@click.option("--ids", "numbers", multiple=True, metavar="N,N,...", help="Go on from these tokens; repeat for several.")
@click.option(
    "--tokenizer",
    "tokens",
    metavar="FILE",
    help="A tokenizer.json, its directory, or 'bytes' (as where there are 256).",
)
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=int, help="Draw from the K likeliest tokens.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from the likeliest that sum to P.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1 avoids what was said.")
@click.option("--eos", multiple=True, type=int, metavar="N", help="Stop after this token; repeat for several.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of what is drawn.")
@click.option(
    "--speculate",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Guess N tokens from the text so far and read them in one step; the text is the same.",
)
@provider_option
@common_options
@click.pass_obj
def command(
    state: State,
    /,
    directory: str,
    texts: tuple[str, ...],
    numbers: tuple[str, ...],
    tokens: str | None,
    provider: tuple[Provider, ...],
    eos: tuple[int, ...],
    **options: Any,
) -> None:
    """Write on from prompts with the streaming artifact DIR of a language model, and print the new text."""
    if bool(texts) == bool(numbers):
        raise UsageError("give either --prompt TEXT or --ids N,N,...")

    from seqc.runtime import load
    from seqc.runtime.generate import token_ports

    session = load(directory, providers=list(provider) or None)
    vocabulary = int(token_ports(session.manifest)[1].shape[-1])
    spell = tokenizer(tokens, vocabulary) if texts else None
    prompts = [spell.encode(text) for text in texts] if spell is not None else [_ids(text) for text in numbers]
    at_once = len(prompts) == 1 and not state.json
    start = time.perf_counter()
    written = session.generate(prompts, eos=eos, on_token=_printer(spell) if at_once else None, **options)
    seconds = time.perf_counter() - start
    if state.json:
        rows = [{"ids": w.tolist(), "text": spell.decode(w.tolist()) if spell else None} for w in written]
        print_json({"prompts": prompts, "written": rows, "seconds": seconds, "providers": list(session.providers)})
        return
    click.echo("" if at_once else "\n\n".join(_text(spell, w) for w in written))
    count = sum(map(len, written))
    note(f"{count} tokens in {seconds:.2f} s, prompts included: {count / seconds:.0f} per second")


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UsageError(f"--ids takes N,N,..., not {text!r}") from None


def _printer(spell: Tokenizer | None) -> Any:
    decode = spell.decoder() if spell is not None else lambda token: f"{token} "

    def show(row: int, token: int) -> None:
        click.echo(decode(token), nl=False)

    return show


def _text(spell: Tokenizer | None, written: Array) -> str:
    ids: Sequence[int] = written.tolist()
    return spell.decode(ids) if spell is not None else " ".join(map(str, ids))
