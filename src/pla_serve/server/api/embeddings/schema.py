"""Bodies of requests for embeddings and for scores."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from pla_serve.server.api.schema import MAX_SEQUENCES, Ignored, Prompts, TierField
from pla_serve.server.api.strict import Strict, wrong

_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_SEQUENCES}


def read_texts(value: object) -> list[str]:
    """Return a text, or a list of texts, as a list.

    Raises:
        ValueError: it is something else, or they are too many.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or len(texts) > MAX_SEQUENCES:
        raise ValueError(f"give a string, or a list of 1 to {MAX_SEQUENCES} of them")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("each item must be a string")
    return texts


TextList = Annotated[
    list[str],
    PlainValidator(read_texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS]}),
]


class VectorRequest(Ignored):
    """What requests for vectors share. The fields mean the same as in completions."""

    model: str | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    priority: int = Field(0, ge=-(2**31), le=2**31 - 1)
    service_tier: TierField | None = None
    ttft_slo_ms: float | None = Field(None, gt=0, le=1e9)
    """The vectors are due this many milliseconds after arrival."""


class EmbeddingRequest(VectorRequest):
    """Body of ``/v1/embeddings``."""

    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=2**31 - 1)
    """First numbers of each vector that are wanted, if the model was trained for that."""
    add_special_tokens: bool = True
    """Whether the tokenizer adds its own to texts."""


class ScoreRequest(VectorRequest):
    """Body of ``/v1/score``: vLLM's."""

    text_1: TextList
    text_2: TextList

    @model_validator(mode="after")
    def _pairs(self) -> ScoreRequest:
        if len(self.text_1) not in (1, len(self.text_2)):
            raise wrong("text_1", "give one text_1 for all of text_2, or one for each")
        if len(self.text_1) + len(self.text_2) > MAX_SEQUENCES:
            raise wrong("text_2", f"at most {MAX_SEQUENCES} texts in one request")
        return self


class RerankDocument(Strict):
    """A document as an object."""

    text: str


class RerankRequest(VectorRequest):
    """Body of ``/v1/rerank``: Jina's and Cohere's."""

    query: str
    documents: Annotated[
        list[str | RerankDocument],
        Field(min_length=1, max_length=MAX_SEQUENCES - 1, fail_fast=True),
    ]
    top_n: int | None = Field(None, ge=0, le=2**31 - 1)
    """Best documents that are wanted; 0 and None: all."""
    return_documents: bool = True

    @property
    def texts(self) -> list[str]:
        """Texts of the documents."""
        return [each if isinstance(each, str) else each.text for each in self.documents]
