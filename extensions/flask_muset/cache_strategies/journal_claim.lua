-- Claim keys that are due, those that are due longest first.
-- ARGV: place, token, microseconds of a lease, home, how many at most, whether early.
-- Returns the claims, and the microseconds until another key is due, or -1 if there is none.
local token, home, limit = ARGV[2], ARGV[4], tonumber(ARGV[5])
local now = clock()
local ends, last = now + ARGV[3], ARGV[6] == '1' and '+inf' or now
local claims, size, alive, next_at = {}, 0, {}, nil

local function later(at)
  if not next_at or at < next_at then next_at = at end
end

local function alive_until(name)
  alive[name] = alive[name] or tonumber(redis.call('ZSCORE', HOMES, name) or 0)
  return alive[name]
end

-- Claim a key, unless somebody has it or it is left to its home; whether it stays where it is.
local function try(key, due, bound)
  local state = known(key)
  if is_held(state, now) then
    later(tonumber(state.ends))
    return true
  end
  if bound and bound ~= '' and bound ~= home and alive_until(bound) > now then
    later(math.max(due, alive_until(bound)))
    return true
  end
  local claim, records, bytes = take(key, token .. ':' .. #claims, now, ends)
  if records == 0 then
    redis.call('HDEL', facts(key), 'token', 'ends', 'ids')
    return tidy(key, now)
  end
  claims[#claims + 1], size = claim, size + bytes
  return true
end

begin()
local offset, is_full = 0, false
repeat
  local page = redis.call('ZRANGEBYSCORE', DUE, '-inf', last, 'WITHSCORES', 'LIMIT', offset, 100)
  local keys = {}
  for index = 1, #page, 2 do keys[#keys + 1] = page[index] end
  local bound = #keys > 0 and redis.call('HMGET', BOUND, unpack(keys))
  for index, key in ipairs(keys) do
    local due = tonumber(page[2 * index])
    is_full = #claims == limit or size >= MOST_BYTES
    if is_full then
      later(due)
      break
    end
    if try(key, due, bound[index]) then offset = offset + 1 end
  end
until is_full or #keys < 100
if not is_full and last == now then
  local next = redis.call('ZRANGEBYSCORE', DUE, '(' .. string.format('%.0f', now), '+inf',
    'WITHSCORES', 'LIMIT', 0, 1)
  if next[2] then later(tonumber(next[2])) end
end
for _, claim in ipairs(claims) do redis.call('ZADD', DUE, ends, claim[1]) end
return {claims, next_at and math.max(0, next_at - now) or -1}
