"""T5's `spiece.model`, read without the converter of transformers.

That one runs code which protobuf generated for the package sentencepiece, and which
refuses every protobuf that is older than its generator: the newest that Apache Beam
allows is. Here the message is described at run time, which every protobuf reads.
"""

import dataclasses
import functools
import pathlib
import shutil
import tempfile
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from pixsigma_jax.convert.files import read_json, write_json

SPIECE, TOKENIZER = "spiece.model", "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_CLASS = "T5Tokenizer"

# Message → its fields (name, number, type), of sentencepiece_model.proto; the numbers
# of all others are skipped.
_MESSAGES: dict[str, tuple[tuple[str, int, str], ...]] = {
  "Piece": (("piece", 1, "string"), ("score", 2, "float")),
  "Trainer": (("model_type", 3, "int32"), ("unk_id", 40, "int32")),
  "Normalizer": (("precompiled_charsmap", 2, "bytes"),),
  "Model": (
    ("pieces", 1, "Piece"),
    ("trainer_spec", 2, "Trainer"),
    ("normalizer_spec", 3, "Normalizer"),
  ),
}
_UNIGRAM = 1  # and the default of a file that does not say its type
_UNKNOWN = 2  # T5's id of what it does not know


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The parts of a SentencePiece model that a tokenizer needs.

  Attributes:
    pieces: each token with its logarithmic probability, in the order of ids.
    characters: the compiled table by which text is normalized first; None for none.
  """

  pieces: list[tuple[str, float]]
  characters: bytes | None


def read_vocabulary(path: pathlib.Path) -> Vocabulary:
  """The vocabulary of a SentencePiece model of T5's kind.

  Raises:
    ValueError: it is damaged, or no unigram model whose unknown token is T5's.
  """
  model = _model_class()()
  try:
    model.ParseFromString(path.read_bytes())
  except DecodeError as error:
    raise ValueError(
      f"{path} is no SentencePiece model, or is damaged ({error}): fetch it again."
    ) from error
  if not model.pieces:
    raise ValueError(f"{path} is a SentencePiece model without a vocabulary.")
  kind = model.trainer_spec.model_type or _UNIGRAM
  unknown = model.trainer_spec.unk_id
  if kind != _UNIGRAM or unknown != _UNKNOWN:
    raise ValueError(
      f"{path} is a SentencePiece model of type {kind} with id {unknown} for what it "
      f"does not know; T5's is of type {_UNIGRAM} (unigram) with id {_UNKNOWN}. It is "
      "another model's."
    )
  return Vocabulary(
    [(piece.piece, piece.score) for piece in model.pieces],
    model.normalizer_spec.precompiled_charsmap or None,
  )


def load_fast_tokenizer(folder: pathlib.Path) -> Any:
  """The fast tokenizer of transformers for a folder that has `spiece.model` alone.

  Settings beside it count as they do for transformers; without tokenizer_config.json
  they are T5's.

  Raises:
    ValueError: the vocabulary or the settings cannot be used.
  """
  from transformers import AutoTokenizer, T5Tokenizer

  vocabulary = read_vocabulary(folder / SPIECE)
  settings = folder / _SETTINGS
  fields = read_json(settings) if settings.exists() else {"tokenizer_class": _CLASS}
  extra = fields.get("extra_ids", 100)
  if not isinstance(extra, int) or extra < 0:
    raise ValueError(
      f"{settings} has extra_ids={extra!r}: a number from 0 on is meant."
    )
  # T5's sentinels, of which the SentencePiece model knows nothing, count downwards.
  sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(extra))]
  tokenizer = T5Tokenizer(
    vocab=[*vocabulary.pieces, *sentinels],
    _spm_precompiled_charsmap=vocabulary.characters,
    extra_ids=extra,
  )
  # As transformers itself would have saved it, so that all that it does with settings
  # and added tokens stays its own.
  with tempfile.TemporaryDirectory() as name:
    complete = pathlib.Path(name)
    for path in folder.glob("*.json"):
      shutil.copyfile(path, complete / path.name)
    write_json(complete / _SETTINGS, fields)
    tokenizer.backend_tokenizer.save(str(complete / TOKENIZER))
    return AutoTokenizer.from_pretrained(complete, local_files_only=True)


@functools.cache
def _model_class() -> Any:
  """The class of the whole message, in a pool of its own.

  In protobuf's common pool it would meet sentencepiece's or transformers' of that name.
  """
  field_types = descriptor_pb2.FieldDescriptorProto
  file = descriptor_pb2.FileDescriptorProto(name="spiece.proto", syntax="proto2")
  for message, fields in _MESSAGES.items():
    described = file.message_type.add(name=message)
    for name, number, kind in fields:
      field = described.field.add(name=name, number=number)
      repeated = message == "Model" and name == "pieces"
      field.label = (
        field_types.LABEL_REPEATED if repeated else field_types.LABEL_OPTIONAL
      )
      if kind in _MESSAGES:
        field.type, field.type_name = field_types.TYPE_MESSAGE, f".{kind}"
      else:
        field.type = getattr(field_types, f"TYPE_{kind.upper()}")
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName("Model"))
