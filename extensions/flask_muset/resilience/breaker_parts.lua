-- What the scripts of breakers need; it stands before each of them, behind KEPT: for how many
-- milliseconds a state is stored.
-- A breaker is a hash: its version and state, when that ends (milliseconds of Redis's clock, 0 for
-- never) and how long it lasts, how often it has opened, and since when. While it is half-open,
-- which is open with no time left, probe:<token> is until when a probe has its place, and ok:<token>
-- stands for one that has succeeded. A change leaves none of them.
-- ARGV of those that change: channel, sender, name, the version that the caller knows.
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local now = math.floor(now_us / 1000)

local function text(number) return string.format('%.0f', number) end

local function read(key)
  local list = redis.call('HGETALL', key)
  if #list == 0 then return nil end
  local found = {}
  for index = 1, #list, 2 do found[list[index]] = list[index + 1] end
  if found.ends ~= '0' and found.ends - now > tonumber(found.lasts) then
    -- The clock has been set back; it ends no later than if it began now.
    found.ends = text(now + found.lasts)
    redis.call('HSET', key, 'ends', found.ends)
  end
  return found
end

local function is_forced(state) return string.sub(state, 1, 7) == 'forced_' end

-- What is said of a state: times are milliseconds from now, -1 for none.
local function told(found)
  local state, left, age = found.state, -1, -1
  if found.ends ~= '0' then left = math.max(0, found.ends - now) end
  if found.since ~= '0' then age = math.max(0, now - found.since) end
  if left == 0 and is_forced(state) then state, left, age = 'closed', -1, -1 end
  return {found.version, state, text(left), found.trips, text(age)}
end

local function change(stored, state, left, trips, age)
  left, age = tonumber(left), tonumber(age)
  -- With the time in it, it grows also when Redis has lost everything.
  local version = math.max(now_us, ARGV[4] + 1, stored and stored.version + 1 or 0)
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1],
    'version', text(version), 'state', state, 'trips', trips,
    'ends', left < 0 and '0' or text(now + left), 'lasts', text(left),
    'since', age < 0 and '0' or text(now - age))
  if left >= 0 or not is_forced(state) then
    redis.call('PEXPIRE', KEYS[1], text(KEPT + math.max(0, left)))
  end
  local new = told(read(KEYS[1]))
  redis.call('PUBLISH', ARGV[1], ARGV[2] .. 'b' .. table.concat(new, ' ') .. ' ' .. ARGV[3])
  return new
end

