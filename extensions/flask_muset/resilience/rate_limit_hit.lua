-- Count one hit against a limit that processes share, and lend the process that asks some more.
-- KEYS: a hash: in `whole` the microsecond at which the whole limit is there again, and for each lease
-- `tokens:end`.
-- ARGV: microseconds between two hits, of the burst, tokens that may be lent in all, microseconds that
-- a lease lasts, tokens that there must be for a hit to count, a lease that is over, the name of a new
-- one. Both names may be empty.
-- Returns: microseconds to wait, 0 if the hit counts; tokens lent; microseconds until all is whole.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local interval, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local free, lasts, least = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local whole, last_end = now, now
local fields = redis.call('HGETALL', KEYS[1])
for index = 1, #fields, 2 do
  local name, value = fields[index], fields[index + 1]
  if name == 'whole' then
    whole = tonumber(value)
  else
    local tokens, ends = string.match(value, '^(%d+):(%d+)$')
    ends = tonumber(ends)
    if name == ARGV[6] or ends <= now then
      redis.call('HDEL', KEYS[1], name)
    else
      free = free - tokens
      last_end = math.max(last_end, ends)
    end
  end
end
-- Nothing is whole later than this; if it says so, the clock was set back.
whole = math.min(math.max(whole, now), now + burst)
local room = math.floor((now + burst - whole) / interval)
if room < least then
  return {whole + least * interval - burst - now, 0, whole - now}
end
local lent = 0
if ARGV[7] ~= '' then
  lent = math.max(0, math.min(math.ceil(free / 8), room - 1))
end
if lent > 0 then
  redis.call('HSET', KEYS[1], ARGV[7], string.format('%d:%.0f', lent, now + lasts))
  last_end = now + lasts
end
whole = whole + (1 + lent) * interval
redis.call('HSET', KEYS[1], 'whole', string.format('%.0f', whole))
redis.call('PEXPIRE', KEYS[1], math.ceil((math.max(whole, last_end) - now) / 1000))
return {0, lent, whole - now}
