-- Claim keys that are due, those that are due longest first.
-- ARGV: place, token, microseconds of a lease, home, how many at most, whether early.
-- Returns the claims, and the microseconds until another key is due, or -1 if there is none.
local token, lease, home, limit = ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local now = clock()
local last = ARGV[6] == '1' and '+inf' or now
local claims, size, alive, next_at, is_cut = {}, 0, {}, nil, false
-- So many keys are looked at, those that are due first; the others when these are gone.
local MOST_KEYS, PAGE, LOOK = 1000, 100, 1000000

local function later(at)
  if not next_at or at < next_at then next_at = at end
end

local function alive_until(name)
  alive[name] = alive[name] or tonumber(redis.call('ZSCORE', HOMES, name) or 0)
  return alive[name]
end

-- Claim a key, unless somebody has it or it is left to its home; whether it stays where it is.
local function try(key, due, bound)
  if bound and bound ~= '' and bound ~= home and lasts(alive_until(bound), lease, now) then
    later(math.max(due, alive_until(bound)))
    return true
  end
  local state = known(key)
  if is_held(state, now) then
    later(tonumber(state.ends))
    return true
  end
  local room = math.max(0, MOST_BYTES - size)
  local claim, records, bytes = take(key, state, token .. ':' .. #claims, now, lease, room)
  if records == 0 then
    let_go(key)
    return tidy(key, now)
  end
  claims[#claims + 1], size = claim, size + bytes
  return true
end

local function is_full() return #claims == limit or size >= MOST_BYTES end

-- Try the keys of a page, which has their moments too, until it is enough; how many stay there.
local function try_all(page)
  local keys, stay = {}, 0
  for index = 1, #page, 2 do keys[#keys + 1] = page[index] end
  local bound = #keys > 0 and redis.call('HMGET', BOUND, unpack(keys))
  for index, key in ipairs(keys) do
    local due = tonumber(page[2 * index])
    if is_full() then
      is_cut = true
      later(due)
      break
    end
    if try(key, due, bound[index]) then stay = stay + 1 end
  end
  return stay
end

-- Claims whose ends are further away than any: the clock was set back since.
local function try_far()
  local page = redis.call('ZREVRANGEBYSCORE', DUE, '+inf',
    '(' .. string.format('%.0f', now + 2 * lease), 'WITHSCORES', 'LIMIT', 0, PAGE)
  local claimed = {}
  for index = 1, #page, 2 do
    local found = redis.pcall('HEXISTS', facts(page[index]), 'token')
    if found == 1 then
      claimed[#claimed + 1] = page[index]
      claimed[#claimed + 1] = page[index + 1]
    end
  end
  try_all(claimed)
end

begin()
local offset, looked, is_last = 0, 0, false
repeat
  local page = redis.call('ZRANGEBYSCORE', DUE, '-inf', last, 'WITHSCORES', 'LIMIT', offset, PAGE)
  offset, looked, is_last = offset + try_all(page), looked + PAGE, #page < 2 * PAGE
until is_cut or is_last or looked == MOST_KEYS
if not (is_cut or is_last) then later(is_full() and now or now + LOOK) end
if not is_cut and last == now then
  if not is_full() then try_far() end
  local next = redis.call('ZRANGEBYSCORE', DUE, '(' .. string.format('%.0f', now), '+inf',
    'WITHSCORES', 'LIMIT', 0, 1)
  if next[2] then later(tonumber(next[2])) end
end
for _, claim in ipairs(claims) do redis.call('ZADD', DUE, now + lease, claim[1]) end
return {claims, next_at and math.max(0, next_at - now) or -1}
