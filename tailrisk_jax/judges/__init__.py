"""Responses to scores in [0, 1], or NaN for unscored."""

from tailrisk_jax.judges.answers import default_cache
from tailrisk_jax.judges.events import KeywordEvent, RegexEvent, TargetEvent, TokensEvent
from tailrisk_jax.judges.finetuned import FinetunedStrongReject
from tailrisk_jax.judges.function import FunctionJudge
from tailrisk_jax.judges.judge import Judge, Judgements, Response, question
from tailrisk_jax.judges.refusals import REFUSALS, NoRefusal
from tailrisk_jax.judges.rubric_judge import RubricJudge
from tailrisk_jax.judges.rubrics import Rubric, make_rubric
from tailrisk_jax.judges.server import Server
from tailrisk_jax.judges.threshold import Threshold

__all__ = [
    "REFUSALS",
    "FinetunedStrongReject",
    "FunctionJudge",
    "Judge",
    "Judgements",
    "KeywordEvent",
    "NoRefusal",
    "RegexEvent",
    "Response",
    "Rubric",
    "RubricJudge",
    "Server",
    "TargetEvent",
    "Threshold",
    "TokensEvent",
    "default_cache",
    "make_rubric",
    "question",
]
