-- Say that the source is being written; the microseconds of now.
-- KEYS: value, lock.  ARGV: token, milliseconds, channel, sender, name.
-- The value goes first: whoever dies while he writes the source leaves no old one behind, and a Redis
-- that has no memory for the lock forgets it all the same. The lock counts the writes that go on; of
-- two at once nobody knows which is the last.
redis.call('UNLINK', KEYS[1])
redis.call('PUBLISH', ARGV[3], ARGV[4] .. 'k' .. ARGV[5])
local held = redis.call('GET', KEYS[2])
local count = held and string.match(held, '^W(%d+):')
if count and held ~= 'W1:' .. ARGV[1] then
  redis.call('SET', KEYS[2], 'W' .. (count + 1) .. ':-', 'PX', ARGV[2])
else
  redis.call('SET', KEYS[2], 'W1:' .. ARGV[1], 'PX', ARGV[2])
end
local time = redis.call('TIME')
return string.format('%.0f', time[1] * 1000000 + time[2])
