#!/usr/bin/env bash
# Runs timm's own per-model tests on models of this package:
#   scripts/timm_tests.sh [--all | MODEL...]      one of each architecture by default
# The tests come from the source release of the installed timm; their bodies are not touched,
# scripts/timm_conftest.py only gives them our model names.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
names="qna_vit_tiny ga_convnext_tiny ga_cswin_tiny ga_resnet50 ga_vit_small cswin_tiny ga_backbone"
names="$names sa_resnet_small_adaptive"
if [ "${1:-}" = "--all" ]; then
    names=$("$PYTHON" -c 'import timm, qna_timm.models as m
print(*(n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith(m.__name__)))')
elif [ $# -gt 0 ]; then
    names=$*
fi
version=$("$PYTHON" -c 'from importlib.metadata import version; print(version("timm"))')
cache=.cache/timm-$version
if [ ! -f "$cache/test_models.py" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary timm \
        --dest "$work" "timm==$version"
    tar -xzf "$work/timm-$version.tar.gz" -C "$work" "timm-$version/tests/test_models.py"
    mkdir -p "$cache"
    mv "$work/timm-$version/tests/test_models.py" "$cache/test_models.py"
fi
cp scripts/timm_conftest.py "$cache/conftest.py"
select=$(echo "$names" | sed 's/ / or /g')
echo "timm $version's tests of: $names"
parallel=()
if [[ $names == *" "* ]]; then # for one model, starting processes costs more than they save
    export OMP_NUM_THREADS=1
    parallel=(-n 2 --dist worksteal)
fi
QNA_TIMM_CONTRACT_MODELS=$names "$PYTHON" -m pytest -q -c /dev/null --rootdir "$cache" \
    -p no:cacheprovider -W ignore ${parallel[@]+"${parallel[@]}"} -k "$select" "$cache/test_models.py"
