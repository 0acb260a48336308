-- Write or delete keys, whatever was there; the microseconds at which it was done.
-- A load that goes on loses its lease. A write of the source that goes on does not know any more
-- whether it is the last one. What comes so late that its sender has given up writes nothing: there
-- may be a newer value by then.
-- KEYS: values, then as many locks.  ARGV: channel, sender, then for each a value or nothing to
-- delete it, its milliseconds or 0 for no end, and its name; at the end the microseconds of too late.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local is_late = now > tonumber(ARGV[#ARGV])
local count = #KEYS / 2
for index = 1, count do
  local value, lock = KEYS[index], KEYS[count + index]
  local held = redis.call('GET', lock)
  if held and string.sub(held, 1, 1) == 'W' then
    redis.call('SET', lock, string.match(held, '^W%d+:') .. '-', 'KEEPTTL')
  elseif held then
    redis.call('DEL', lock)
  end
  local bytes, lifetime, name = ARGV[3 * index], ARGV[3 * index + 1], ARGV[3 * index + 2]
  if bytes == '' or is_late then
    redis.call('UNLINK', value)
  elseif lifetime == '0' then
    redis.call('SET', value, bytes)
  else
    redis.call('SET', value, bytes, 'PX', lifetime)
  end
  redis.call('PUBLISH', ARGV[1], ARGV[2] .. 'k' .. name)
end
return string.format('%.0f', now)
