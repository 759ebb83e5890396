"""Any Python function as a judge."""

import dataclasses
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tailrisk_jax.errors import InputError
from tailrisk_jax.judges.judge import Judgements, Response


@dataclasses.dataclass(frozen=True)
class FunctionJudge:
    """A function from a list of `Response` to a score for each.

    It returns one number in [0, 1] per response, in order, as a list or array; None or NaN where
    it can't score one. Or else `Judgements`, with raw output and reasons.

    Attributes:
      function: the function.
      where: its name, "module:function"; for a file only the file's own name counts.
      sha256: of the file that defines it; what that file imports isn't covered.
    """

    function: Callable[[list[Response]], Any]
    where: str
    sha256: str | None = None
    name = "python"
    version = "1"

    @classmethod
    def load(cls, where: str) -> "FunctionJudge":
        """From "module:function" or "path/to/file.py:function".

        Modules are found in the current folder too, and those beside a file are found by it.

        Raises:
          InputError: no such module, file or function, or a file that fails when it is run.
        """
        source, colon, name = where.rpartition(":")
        if not colon or not source or not name:
            raise InputError(
                f"judge python:{where} names no function; give python:module:function or "
                "python:path/to/file.py:function"
            )
        module = _module(source)
        function = getattr(module, name, None)
        if not callable(function):
            raise InputError(f"judge python:{where}: {source} has no function {name!r}; check it")
        file = getattr(module, "__file__", None)
        sha256 = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
        return cls(function, f"{Path(source).name}:{name}", sha256)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Which function, and the hash of its file."""
        return {"function": self.where, "sha256": self.sha256}

    def __call__(self, responses: Sequence[Response]) -> Judgements:
        """Scores responses.

        Raises:
          InputError: the function raises, or returns something other than what it should.
        """
        try:
            result = self.function(list(responses))
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(
                f"judge {self.where} raised {type(error).__name__} ({' '.join(str(error).split())})"
                f" in line {at.lineno} of {Path(at.filename).name}; mend it"
            ) from error
        judged = result if isinstance(result, Judgements) else self._judgements(result)
        counts = {len(judged.scores), len(judged.raw), len(judged.errors)}
        if counts != {len(responses)}:
            raise InputError(
                f"judge {self.where} returned {len(judged.scores)} scores for {len(responses)} "
                "responses; return one for each, None where there is none"
            )
        bad = [score for score in judged.scores if not (np.isnan(score) or 0 <= score <= 1)]
        if bad:
            raise InputError(
                f"judge {self.where} returned the score {bad[0]}; scores are in [0, 1], so divide "
                "by the top of the scale, or give None"
            )
        return judged

    def _judgements(self, result: Any) -> Judgements:
        try:
            scores = [np.nan if score is None else _number(score) for score in result]
        except TypeError as error:
            raise InputError(
                f"judge {self.where} returned {error}; return a list of numbers in [0, 1], one "
                "per response"
            ) from None
        return Judgements.of(scores)


def _number(score: Any) -> float:
    """A number; text isn't one, and neither is an array of several."""
    if isinstance(score, str | bytes) or np.ndim(score):
        raise TypeError(f"{score!r} as a score")
    return float(score)


def _module(source: str) -> ModuleType:
    is_file = source.endswith(".py")
    folder = str(Path(source).resolve().parent) if is_file else str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if not is_file:
            return importlib.import_module(source)
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)  # dataclasses look themselves up there
        spec.loader.exec_module(module)
        return module
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(
            f"judge python:{source} can't be loaded ({reason}); check the path"
        ) from error
