-- Let claims that are still held last longer.
-- ARGV: place, microseconds of a lease, then the name and the token of each.
local now = clock()
local lease = tonumber(ARGV[2])
begin()
for index = 3, #ARGV, 2 do
  local key = ARGV[index]
  local state = known(key)
  if state.token == ARGV[index + 1] and is_held(state, now) then
    redis.call('HSET', facts(key), 'ends', now + lease, 'lease', lease)
    redis.call('ZADD', DUE, now + lease, key)
  end
end
return 1
