#!/usr/bin/env bash
# Edit two pictures with curl: edit.sh FIRST SECOND PROMPT OUT
# BASE_URL is the address of the server; UNIREF_API_KEY is its key, if it asks for one.
set -euo pipefail

curl --fail-with-body --silent --show-error "${BASE_URL:-http://127.0.0.1:8000/v1}/images/edits" \
    -H "Authorization: Bearer ${UNIREF_API_KEY:-none}" \
    -F "image[]=@$1" -F "image[]=@$2" -F "prompt=$3" -F seed=1 \
    | python3 -c 'import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))' \
    > "$4"
