-- Take the locks of keys that are made invalid from those who load them; those who write their source
-- keep them, and do not know any more whether they are the last.  KEYS: locks.
for _, lock in ipairs(KEYS) do
  local held = redis.call('GET', lock)
  if held and string.sub(held, 1, 1) == 'W' then
    redis.call('SET', lock, string.match(held, '^W%d+:') .. '-', 'KEEPTTL')
  else
    redis.call('DEL', lock)
  end
end
return #KEYS
