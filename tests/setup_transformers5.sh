#!/bin/sh
# Installs transformers 5 beside the virtual environment of PYTHON, whose streaming wants version 4. What is exported for
# transformers is tested with both; without it the tests with version 5 are skipped: so nothing here may fail.
place=$("$1" -c 'import sys; print(sys.prefix)')/transformers-5
if [ ! -e "$place/.installed" ]; then
    rm -rf "$place"
    "$1" -m pip install -qq --disable-pip-version-check --no-deps --target "$place" transformers==5.0.0 \
        huggingface_hub==1.33.0 tokenizers==0.22.2 && touch "$place/.installed"
fi
[ -e "$place/.installed" ] || echo "no transformers 5: what is exported is tested with version 4 alone"
exit 0
