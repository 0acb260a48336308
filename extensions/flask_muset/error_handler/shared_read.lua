-- Read some of the newest faults.
-- KEYS: seen.  ARGV: place, how many to pass over, most faults, most occurrences of each, most bytes
-- of one text, bytes after which no further fault is read, seconds that faults are kept.
-- Returns of each: fingerprint, microseconds, description, count, occurrences, the newest first. Of
-- one that nobody of ours has written, the fingerprint alone.
local call, pcall = redis.call, redis.pcall
local place, first, most, most_of_each = unpack(ARGV, 1, 4)
local longest, room = tonumber(ARGV[5]), tonumber(ARGV[6])
local time = call('TIME')
local oldest = string.format('%.0f', (time[1] - ARGV[7]) * 1000000 + time[2])

-- The bytes of some texts; nil if they are no texts, or too long.
local function size_of(texts)
  local size = 0
  if texts.err then return nil end
  for _, text in ipairs(texts) do
    if not text or #text > longest then return nil end
    size = size + #text
  end
  return size
end

local seen = pcall('ZREVRANGEBYSCORE', KEYS[1], '+inf', '(' .. oldest, 'WITHSCORES',
  'LIMIT', first, most)
local found, total = {}, 0
-- Where it is no sorted set, nothing was added yet.
if seen.err then return found end
for index = 1, #seen, 2 do
  if total >= room then break end
  local fault = seen[index]
  local facts = pcall('HMGET', place .. 'f:' .. fault, 'fault', 'count')
  local newest = pcall('ZREVRANGE', place .. 'n:' .. fault, 0, most_of_each - 1)
  local size, more = size_of(facts), size_of(newest)
  if size and more then
    found[#found + 1] = {fault, seen[index + 1], facts[1], facts[2], newest}
    total = total + size + more
  else
    found[#found + 1] = {fault}
  end
end
return found
