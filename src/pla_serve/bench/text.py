"""Filler: texts of ordinary words without meaning, of a wanted number of tokens.

A part of filler is named by a key. Equal keys give equal words, and a shorter part is the beginning
of a longer one with the same key; that is how prompts share prefixes. The salt goes into every
draw, so two runs with different salts share no prefix.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

_LIST = """
able about above across action actually after again against ago air all almost alone along already
also always among amount and animal another answer any apple area arm around arrive art ask away
baby back bad bag ball bank base bear beautiful because become bed before began behind believe bell
below best better between big bird black blood blue board boat body bone book born both bottom box
boy branch bread break bridge bright bring broad brother brown build building burn business busy
buy call camp car card care carry case catch cause cell center central certain chair chance change
chapter character charge check child choice choose church circle city class clean clear climb clock
close clothes cloud coast cold color come common company complete condition consider contain
control cook cool copy corn corner correct cost cotton count country course cover create cross
crowd cry cut dance dark daughter day dead deal death decide deep degree describe desert design
develop die differ difference direct distance divide doctor dog door double down draw dream dress
drink drive drop dry during each early earth ease east easy eat edge effect egg eight either
electric else empty end enemy energy engine enough enter equal even evening event ever every exact
example except exercise expect experience explain eye face fact fall family famous far farm fast
father favor fear feel feet few field fig fight figure fill final find fine finger finish fire
first fish fit five flat floor flow flower fly follow food foot force foreign forest form forward
found four free fresh friend front fruit full fun further future game garden gas gather general
gentle get girl give glad glass go gold good govern grand grass gray great green ground group grow
guess guide hair half hand happen happy hard hat have head hear heart heat heavy held help high
hill history hold hole home hope horse hot hour house how however huge human hundred hunt hurry ice
idea imagine inch include increase indicate industry insect instrument interest iron island job
join joy jump just keep key kind king kitchen know lady lake land language large last late laugh
law lay lead leaf learn leave left leg length less letter level lie life lift light like line list
listen little live local log long look lost lot loud love low machine magic main major make man
many map mark market mass master match material matter mean measure meat meet melody memory men
metal method middle might mile milk million mind minute miss mix modern moment money month moon
more morning most mother motion mount mountain mouth move much music must name narrow nation
natural nature near necessary neck need neighbor never new next night nine noise noon north nose
note nothing notice noun now number object observe occur ocean offer office often oil old once one
only open operate opposite orange order organ original other our out over own oxygen page paint
pair paper parent part party pass past path pattern pay people perhaps period person phrase pick
picture piece place plain plan plane planet plant play please plural poem point poor popular port
position possible pound power practice prepare present press pretty print probable problem process
produce product proper property protect prove provide public pull push put question quick quiet
quite race radio rail rain raise range rather reach read ready real reason receive record red
region remember repeat reply represent require rest result rich ride right ring rise river road
rock roll room root rope rose round row rule run safe sail salt same sand save say scale school
science score sea search season seat second section see seed seem select self sell send sense
sentence separate serve settle seven several shape share sharp sheet shell shine ship shoe shop
shore short should shoulder shout show side sight sign silent silver similar simple since sing
single sister sit six size skill skin sky sleep slow small smell smile snow soft soil soldier
solution solve some son song soon sound south space speak special speech speed spell spend spoke
spot spread spring square stand star start state station stay steam steel step stick still stone
stop store story straight strange stream street stretch string strong student study subject
substance success sudden sugar suggest suit summer sun supply support sure surface surprise swim
symbol system table tail take talk tall teach team teeth tell temperature ten term test than thank
that then there thick thin thing think third those though thought thousand three through throw thus
tie time tiny together tone tool top total touch toward town track trade train travel tree triangle
trip trouble truck true trust try tube turn twenty type uncle under unit until usual valley value
vary verb very view village visit voice vowel wait walk wall want war warm wash watch water wave
way wear weather week weight well west wheel where whether which while white whole wide wife wild
will wind window winter wire wish with woman wonder wood word work world would write wrong yard
year yellow yes yet young
"""
_WORDS = tuple(_LIST.split())

_MIN_WORDS = 128
"""Fewest single-token words to draw from. With fewer, prompts would repeat themselves, so all words
are used, and the mean tokens of a word are counted."""
_FIRST_PLAIN_ID = 1000
"""First token id that is drawn; vocabularies keep special tokens and single bytes below it."""


class Filler(Protocol):
    """Makes prompts. Equal parts give equal prompts."""

    def words(self, pieces: Iterable[FillerPart]) -> str:
        """Return a text of about as many tokens as the parts say, one after another."""
        ...

    def ids(self, pieces: Iterable[FillerPart]) -> list[int]:
        """Return exactly as many token ids as the parts say."""
        ...


@dataclass(frozen=True, slots=True)
class FillerPart:
    """The first ``tokens`` tokens of the endless filler named ``key``."""

    key: str
    tokens: int


@dataclass(frozen=True, slots=True)
class WordFiller:
    """Draws filler from a list of words.

    With a tokenizer, the list holds only words that are one token each after a space, so that a
    text of n words has n tokens, and no text is encoded while a run is measured.
    """

    salt: str
    vocabulary: tuple[str, ...]
    token_ids: tuple[int, ...] | None
    """Token ids of ``vocabulary``; None: ids are drawn from those below ``vocabulary_size``."""
    tokens_per_word: float = 1.0
    vocabulary_size: int = 30_000

    def words(self, pieces: Iterable[FillerPart]) -> str:
        return " ".join(word for piece in pieces for word in self._draw(piece))

    def ids(self, pieces: Iterable[FillerPart]) -> list[int]:
        known: Sequence[int] = self.token_ids or range(_FIRST_PLAIN_ID, self.vocabulary_size)
        return [
            token
            for piece in pieces
            for token in self._random(piece).choices(known, k=piece.tokens)
        ]

    def _draw(self, piece: FillerPart) -> list[str]:
        count = max(1, round(piece.tokens / self.tokens_per_word))
        return self._random(piece).choices(self.vocabulary, k=count)

    def _random(self, piece: FillerPart) -> random.Random:
        return random.Random(f"{self.salt}/{piece.key}")


def make_filler(
    salt: str, tokenizer: Tokenizer | None = None, *, vocabulary_size: int | None = None
) -> WordFiller:
    """Make filler that is sized by ``tokenizer``, or by counting words if there is none."""
    if tokenizer is None:
        return WordFiller(salt, _WORDS, None, 1.0, vocabulary_size or 30_000)
    single = _single_token_words(tokenizer)
    if len(single) >= _MIN_WORDS:
        return WordFiller(salt, tuple(single), tuple(single.values()))
    sample = " " + " ".join(_WORDS)
    per_word = len(tokenizer.encode(sample, add_special_tokens=False).ids) / len(_WORDS)
    return WordFiller(salt, _WORDS, None, per_word, tokenizer.get_vocab_size())


def load_tokenizer(path: Path) -> Tokenizer | None:
    """Load a ``tokenizer.json``, or the one in a model folder; None if there is none."""
    file = path / "tokenizer.json" if path.is_dir() else path
    return Tokenizer.from_file(str(file)) if file.is_file() else None


def calibrated(filler: WordFiller, words: int, tokens: int) -> WordFiller:
    """Return the filler resized: the server counted ``tokens`` tokens in ``words`` words.

    Raises:
        ValueError: no tokenizer counts like that.
    """
    if words < 1 or not 0.2 <= tokens / words <= 20:
        raise ValueError(f"the server counts {tokens} tokens in {words} words; cannot size prompts")
    return WordFiller(
        filler.salt,
        filler.vocabulary,
        filler.token_ids,
        tokens / words,
        filler.vocabulary_size,
    )


def _single_token_words(tokenizer: Tokenizer) -> dict[str, int]:
    """Return words that are one token each inside a sentence, with that token's id."""
    lead = len(tokenizer.encode("the", add_special_tokens=False).ids)
    found: dict[int, list[str]] = {}
    for word in _WORDS:
        ids = tokenizer.encode(f"the {word}", add_special_tokens=False).ids
        if len(ids) == lead + 1:
            found.setdefault(ids[-1], []).append(word)
    # An id that several words share stands for unknown words.
    return {words[0]: token for token, words in found.items() if len(words) == 1}
