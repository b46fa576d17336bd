"""Restores the tokenizer of a GGUF file whose vocabulary is sentencepiece's (BPE, as Llama 2 has).

The file holds pieces, their scores and their types. sentencepiece merges the two neighbours whose
merged piece has the highest score, the leftmost of several, and nothing but the text's own pieces
takes part: bytes and control pieces do not. A list of merges by score does the same in tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType
from tokenizers import Tokenizer, decoders, models, normalizers

from pla_serve.engine.loading.errors import UnsupportedModel

SPACE = "▁"
"""Character that stands for a space in pieces."""
_KEY = "tokenizer.ggml."


def restore(backend: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """Make ``backend``, as transformers reads it, give the tokens of the original model.

    A text gets a space in front where the model adds one, whether or not it begins with a space
    already: transformers would take ``" a"`` for ``"a"``. As in llama.cpp, so does each text that
    follows a special token.

    Args:
        backend: keeps its special tokens and its post-processor.
        metadata: of the file, with the arrays of the tokenizer.

    Raises:
        UnsupportedModel: the file lacks scores or types, or asks for a normalisation of texts that
            is not done here; the message continues a sentence about the file.
    """
    if metadata.get(f"{_KEY}remove_extra_whitespaces") or metadata.get(
        f"{_KEY}precompiled_charsmap"
    ):
        raise UnsupportedModel(
            "its tokenizer normalises texts in a way that is not known here. "
            "Serve its safetensors, which bring their tokenizer."
        )
    pieces, scores, kinds = (
        list(metadata.get(f"{_KEY}{name}", ())) for name in ("tokens", "scores", "token_type")
    )
    if not len(pieces) == len(scores) == len(kinds):
        raise UnsupportedModel("its tokenizer has no scores or types of its pieces.")
    backend.model = models.BPE(
        vocab={piece: id for id, piece in enumerate(pieces)},
        merges=merges(pieces, scores, kinds),
        unk_token=pieces[kinds.index(TokenType.UNKNOWN)] if TokenType.UNKNOWN in kinds else None,
        fuse_unk=True,
        byte_fallback=TokenType.BYTE in kinds,
    )
    prefixed = metadata.get(f"{_KEY}add_space_prefix", True)
    spell = normalizers.Replace(" ", SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spell]) if prefixed else spell
    )
    backend.pre_tokenizer = None
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        steps.append(decoders.Strip(" ", left=1))
    backend.decoder = decoders.Sequence(steps)


def metadata_of(path: Path) -> dict[str, Any]:
    """Return the tokenizer's metadata of a GGUF file, with its arrays."""
    fields = GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith(_KEY)}


def merges(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Return every pair of pieces whose merged text is a piece, the highest score first.

    Of pairs with the same merged piece the longest left part comes first, as it does where equal
    characters are merged from the left.
    """
    score = {
        piece: score
        for piece, score, kind in zip(pieces, scores, kinds, strict=True)
        if kind in (TokenType.NORMAL, TokenType.UNUSED)
    }
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in score
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]
    return sorted(pairs, key=lambda pair: (-score[pair[0] + pair[1]], -len(pair[0])))
