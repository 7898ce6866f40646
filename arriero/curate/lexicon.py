"""The words that the tokeniser of curation has to know, as sorted hashes: abbreviations, contractions and units.

They are English, and matter little: a wrong guess moves a full stop or an apostrophe from one token to the next.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arriero.curate.spans import hash_text

# stay whole: abbreviations, whose full stop ends no sentence (single letters do by rule), and a few odd ones
_WHOLE = """
    Mr. Mrs. Ms. Dr. St. Mt. Jr. Sr. Prof. Gen. Gov. Sen. Rep. Rev. Adm. Messrs. Ph.D. Co. co. Corp. Inc. Ltd. Bros.
    vs. v.s. e.g. i.e. E.g. I.e. E.G. I.E. a.m. p.m. A.M. P.M. Jan. Feb. Mar. Apr. Jun. Jul. Aug. Sep. Sept. Oct. Nov.
    Dec. Ala. Ariz. Ark. Calif. Colo. Conn. Del. Fla. Ga. Ill. Ind. Kan. Ky. La. Mass. Md. Mich. Minn. Miss. Mo. Mont.
    Neb. Nev. Okla. Ore. Pa. Tenn. Va. Wash. Wis. D.C. N.C. N.D. N.H. N.J. N.M. N.Y. S.C.
    's 'S ’s ’S 'll ’ll 're ’re 've ’ve 'd ’d 'em ’em and/or w/o C++ o'clock o’clock ma'am ma’am
    :) :( ;) :D :P :-) :-( ;-) =) 8) <3
"""
# may carry 'd 'll 'm 're 've
_CONTRACTING = """
    i you he she it we they who what when where why how there that this these those could might must should would may
"""
# come off the end of a number
_UNITS = """
    km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz kmh mph hPa Pa mbar mb MB
    kb KB gb GB tb TB T G M K %
"""

WHOLE, CONTRACTING, UNITS = (frozenset(words.split()) for words in (_WHOLE, _CONTRACTING, _UNITS))


class Lexicon(NamedTuple):
    """Sorted hashes, uint64."""

    whole: NDArray[np.uint64]
    contracting: NDArray[np.uint64]
    units: NDArray[np.uint64]


@functools.cache
def lexicon() -> Lexicon:
    """The lists above, hashed; `contracting` of folded words."""
    lists = (WHOLE, CONTRACTING, UNITS)
    return Lexicon(*(np.sort(np.array(list(map(hash_text, words)), np.uint64)) for words in lists))
