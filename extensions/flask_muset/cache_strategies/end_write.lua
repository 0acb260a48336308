-- Say that the source was written, and put in what it has now if this was the only write.
-- KEYS: value, lock.  ARGV: channel, sender, token, value or nothing, its milliseconds or 0 for no
-- end, its name.
local held = redis.call('GET', KEYS[2])
local count, token = string.match(held or '', '^W(%d+):(.*)$')
local is_alone = token == ARGV[3]
if count and tonumber(count) > 1 then
  redis.call('SET', KEYS[2], 'W' .. (count - 1) .. ':-', 'KEEPTTL')
else
  redis.call('DEL', KEYS[2])
end
if not is_alone or ARGV[4] == '' then
  redis.call('UNLINK', KEYS[1])
elseif ARGV[5] == '0' then
  redis.call('SET', KEYS[1], ARGV[4])
else
  redis.call('SET', KEYS[1], ARGV[4], 'PX', ARGV[5])
end
redis.call('PUBLISH', ARGV[1], ARGV[2] .. 'k' .. ARGV[6])
return is_alone and 1 or 0
