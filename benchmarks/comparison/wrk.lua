-- For wrk. Environment: LOAD_BODY, the body with at most one NUMBER in it; LOAD_HEADERS, "name: value" lines; LOAD_FIRST, the number
-- before the first, which each request counts up, or empty for equal requests. Prints what came of it as one line of JSON.
local mark = "@@@@@NUMBER@@@@@"
local body = os.getenv("LOAD_BODY")
local first = os.getenv("LOAD_FIRST")

wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
for line in os.getenv("LOAD_HEADERS"):gmatch("[^\n]+") do
  local name, value = line:match("^([^:]+):%s*(.+)$")
  wrk.headers[name] = value
end

local before, after, number

function init(args)
  local whole = wrk.format(nil, nil, nil, body)
  local from, to = whole:find(mark, 1, true)
  before = from and whole:sub(1, from - 1) or whole
  after = from and whole:sub(to + 1)
  number = tonumber(first)
end

function request()
  if not after then return before end
  if number then number = number + 1 end
  return before .. string.format("%016d", number or 0) .. after
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"requests":%d,"seconds":%f,"p50":%f,"p95":%f,"p99":%f,"refused":%d,"broken":%d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(95), latency:percentile(99),
    errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
