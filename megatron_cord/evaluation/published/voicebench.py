"""VoiceBench (arXiv 2410.17196): ten subsets, each with its kind of score; a row has `prompt` and `audio`.

MT-Bench, the eleventh, has several turns and is not read.
"""

from __future__ import annotations

from megatron_cord.data.choices import Choices, split_options
from megatron_cord.data.fields import listed
from megatron_cord.evaluation.published.rows import Fields, Published, Row, UnusableError, text_of
from megatron_cord.evaluation.rules.choices import VoiceBenchChoices
from megatron_cord.evaluation.rules.ifeval import InstructionFollowing
from megatron_cord.evaluation.rules.instructions import read_instructions
from megatron_cord.evaluation.rules.judged import Rated, Referenced
from megatron_cord.evaluation.rules.reasoning import TASKS, BigBenchHard, task_of
from megatron_cord.evaluation.rules.refusals import Refusals

_REFUSED = "a refusal"  # the answer to each request of AdvBench


def _choices(row: Row) -> Fields:
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise UnusableError(f"it has no text in 'prompt' (its fields: {listed(row)})")
    options = split_options(prompt)
    choices = Choices(options + ("",) * (4 - len(options)))
    return Fields(prompt, row.get("audio"), row.get("reference"), choices, group=row.get("domain"))


def _open(row: Row) -> Fields:
    for name in ("reference", "instruction_id_list"):
        if row.get(name) is not None:
            raise UnusableError(f"it has {name!r}, and questions of this format have no answer; is the format right?")
    return Fields(text_of(row, "prompt"), row.get("audio"), "", answered=False)


def _refused(row: Row) -> Fields:
    asked = _open(row)
    return Fields(asked.text, asked.audio, _REFUSED)


def _referenced(row: Row) -> Fields:
    prompt, reference = text_of(row, "prompt"), text_of(row, "reference")
    if len(reference.strip()) == 1 and split_options(prompt):
        raise UnusableError(f"its reference {reference!r} is the letter of a choice; is the format right?")
    return Fields(prompt, row.get("audio"), reference)


def _instructions(row: Row) -> Fields:
    prompt = text_of(row, "prompt")
    if row.get("instruction_id_list") is None or row.get("kwargs") is None:
        raise UnusableError(f"it has no 'instruction_id_list' with 'kwargs' (its fields: {listed(row)})")
    try:
        return Fields(prompt, row.get("audio"), read_instructions(row["instruction_id_list"], row["kwargs"]))
    except ValueError as error:
        raise UnusableError(str(error)) from None


def _reasoning(row: Row) -> Fields:
    prompt, reference = text_of(row, "prompt"), text_of(row, "reference")
    task = task_of(str(row.get("id")))
    if task is None:
        raise UnusableError(f"its id {str(row.get('id'))[:60]!r} names none of the tasks {', '.join(TASKS)}")
    choices = Choices(("", "") if task == "hyperbaton" else ("Yes", "No"))
    return Fields(prompt, row.get("audio"), reference, choices, group=task)


_LETTERED = ("prompt", "audio", "reference", "domain")
_ASKED = ("prompt", "audio")

VOICEBENCH = {
    "voicebench": Published(_choices, _LETTERED),
    "voicebench/openbookqa": Published(_choices, _LETTERED, VoiceBenchChoices()),
    "voicebench/mmsu": Published(_choices, _LETTERED, VoiceBenchChoices()),
    "voicebench/alpacaeval": Published(_open, _ASKED, Rated()),
    "voicebench/alpacaeval_full": Published(_open, _ASKED, Rated()),
    "voicebench/commoneval": Published(_open, _ASKED, Rated()),
    "voicebench/wildvoice": Published(_open, _ASKED, Rated()),
    "voicebench/sd-qa": Published(_referenced, (*_ASKED, "reference"), Referenced()),
    "voicebench/ifeval": Published(_instructions, (*_ASKED, "instruction_id_list", "kwargs"), InstructionFollowing()),
    "voicebench/bbh": Published(_reasoning, (*_ASKED, "reference"), BigBenchHard()),
    "voicebench/advbench": Published(_refused, _ASKED, Refusals()),
}
