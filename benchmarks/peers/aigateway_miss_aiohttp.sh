# the same as aigateway_miss over aiohttp: run with --unique, beside it
# Needs the project's .venv (scripts/test and the others make it; it has uvloop and httptools).
PORT=9205 URLPATH=/ai/v1/chat/completions READY=/ai/readyz
AIGATEWAY_PYTHON="$PROJECT/.venv/bin/python"
[ -s "$WORK/aigateway.key" ] || "$AIGATEWAY_PYTHON" "$PROJECT/benchmarks/app.py" >"$WORK/aigateway.key"
HEADERS="Authorization: Bearer $(cat "$WORK/aigateway.key")"
CMD="TRANSPORT=aiohttp exec $AIGATEWAY_PYTHON -m uvicorn --app-dir $PROJECT/benchmarks app:app --port 9205 --loop uvloop --http httptools --no-access-log --log-level warning"
