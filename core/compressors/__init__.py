"""The two compressors, and how one is built from a checkpoint's config."""

from core.compressors.base import Compressor, CompressorOutput
from core.compressors.encoder import EncoderCompressor
from core.compressors.n_layers import NLayersCompressor

__all__ = ["Compressor", "CompressorOutput", "EncoderCompressor", "NLayersCompressor"]
