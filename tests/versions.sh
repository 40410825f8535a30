#!/usr/bin/env bash
# The tests of the loss, of torch.compile and of the compiled kernels with several PyTorch versions:
#
#     tests/versions.sh [TORCH ...]        default: 2.11 newest
#
# Each version has an environment of its own in $VERSIONS (default: build/versions), made with
# $PYTHON (default: python3) where it is not there yet. $TESTS: what to run instead; $WORKERS:
# processes (default: 2).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
folder=$(realpath -m "${VERSIONS:-build/versions}")
read -r -a tests <<< "${TESTS:-tests/test_loss.py tests/test_edges.py tests/test_compile.py \
  tests/test_cuda_graph.py tests/test_schedule.py tests/test_memory.py \
  tests/test_dry_run.py tests/test_compile_targets.py}"
failed=()

(($#)) || set -- 2.11 newest
for one; do
  environment=$folder/$one
  if [[ ! -e $environment/ready ]]; then
    "$python" -m venv --clear "$environment"
    packages=(pytest pytest-xdist pytest-benchmark hypothesis)
    packages+=(scikit-build-core nanobind ninja cmake)
    if [[ $one == newest ]]; then
      packages+=(torch numpy)
    else
      packages+=("torch==$one.*")
      # PyTorch 2.11 and older bring a Triton before 3.7, whose interpreter does not know NumPy 2.4.
      if [[ $(printf '%s\n' "$one" 2.11 | sort -V | tail -n 1) == 2.11 ]]; then
        packages+=("numpy<2.4")
      else
        packages+=(numpy)
      fi
    fi
    "$environment/bin/python" -m pip install -q "${packages[@]}"
    # Not isolated: the build's own tools are in the environment, torch is not installed once more.
    PATH="$environment/bin:$PATH" "$environment/bin/python" -m pip install -q --no-deps \
      --no-build-isolation --config-settings build-dir="$environment/build" -e .
    touch "$environment/ready"
  fi
  "$environment/bin/python" -c 'import sys, numpy, torch, triton
print("Python", sys.version.split()[0], "PyTorch", torch.__version__, "Triton", triton.__version__,
    "NumPy", numpy.__version__, flush=True)'
  "$environment/bin/python" -m pytest -q -n "${WORKERS:-2}" -p no:cacheprovider "${tests[@]}" ||
    failed+=("$one")
done

if ((${#failed[@]})); then
  echo "failed with PyTorch ${failed[*]}" >&2
  exit 1
fi
