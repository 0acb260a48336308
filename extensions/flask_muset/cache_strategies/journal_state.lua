-- How much there is.  ARGV: place.
-- Returns the records, their bytes, when the oldest was accepted or nothing, the dead letters, and
-- the microseconds of now.
local counts, now = redis.call('HMGET', COUNTS, 'pending', 'bytes', 'wait'), clock()
local oldest = tonumber(redis.call('ZRANGE', AGE, 0, 0, 'WITHSCORES')[2])
local wait, from, page = tonumber(counts[3]) or 0, 0, nil

local function waits_unclaimed(key)
  if redis.call('ZSCORE', AGE, key) or redis.call('EXISTS', stream(key)) == 0 then return false end
  local claim = redis.pcall('HMGET', facts(key), 'token', 'ends', 'lease')
  return not is_held({token = claim[1], ends = claim[2], lease = claim[3]}, now)
end

-- Keys that nobody has claimed yet have no age. Of these the one that is due first is the oldest,
-- and was accepted the delay of a write before that. No record is read, as it may be large.
local function look(page)
  for index = 1, #page, 2 do
    local since = page[index + 1] - wait
    if since >= (oldest or now) then return true end
    if waits_unclaimed(page[index]) then
      oldest = since
      return true
    end
  end
  return #page < 200
end

repeat
  page = redis.call('ZRANGE', DUE, from, from + 99, 'WITHSCORES')
  from = from + 100
until look(page) or from == 1000
return {counts[1] or '0', counts[2] or '0', oldest and string.format('%.0f', oldest) or '',
  redis.call('XLEN', DEAD), string.format('%.0f', now)}
