-- End a lease; 1 if it was still held.
-- KEYS: value, lock.  ARGV: token, value or nothing, its milliseconds or 0 for no end,
-- milliseconds of a backoff or 0.
if redis.call('GET', KEYS[2]) ~= 'L' .. ARGV[1] then return 0 end
if ARGV[2] ~= '' then
  if ARGV[3] == '0' then
    redis.call('SET', KEYS[1], ARGV[2])
  else
    redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
  end
end
if ARGV[4] == '0' then
  redis.call('DEL', KEYS[2])
else
  redis.call('SET', KEYS[2], 'B', 'PX', ARGV[4])
end
return 1
